"""`speechquilt inspect`: what is in a folder of shards, as numbers, as readable documents, and as a page.

Place in the pipeline: layer 4; reads what every data stage writes.
Trap: the folder holds ids, not a tokenizer. Without one, speech is shown by its ids and text by its number of tokens, with the
original text beside them. Spoken texts are shown whole: their blocks are drawn when a run loads them.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.data.interleaving.speakable import language_of
from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.data.interleaving.verbalise import LANGUAGES, verbalise
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder, open_shards
from speechquilt.evals import noise
from speechquilt.jobs.bulk import STATS
from speechquilt.protocols import SpeechTokenizer
from speechquilt.reports.shard_page import Run, Sample, Unit, write_shard_page
from speechquilt.stages.training_documents import text_fingerprint
from speechquilt.tokenizer.loading import load
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import SILENCE, AlignedTokens, Document, Segment, UnitEnd

SAMPLES, PAGE_SAMPLES = 3, 12
QUANTILES = (5, 50, 95)


@dataclass(kw_only=True)
class Lengths:
    """How often each length came; from 1,000 on to three figures, so that it stays small whatever it counts."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0
    most: int = 0

    def add(self, length: int, times: int = 1) -> None:
        step = 1 if length < 1000 else 10 ** (len(str(length)) - 3)
        self.counts[length // step * step] += times
        self.total += length * times
        self.most = max(self.most, length)

    def summary(self) -> dict[str, float]:
        """`n`, `mean`, `p5`, `p50`, `p95` (the least length that this share of all does not pass) and `most`."""
        n = self.counts.total()
        lengths = sorted(self.counts)
        up_to = np.cumsum([self.counts[length] for length in lengths])
        at = {f"p{q}": lengths[int(np.searchsorted(up_to, q * n / 100))] if n else 0 for q in QUANTILES}
        return {"n": n, "mean": self.total / max(1, n), **at, "most": self.most}


@dataclass(kw_only=True)
class Source:
    """Documents of one source. `words`: of the texts behind those documents that go from text to speech and know their word
    ends; `spoken_words`: those of them that are speech. An ASR or TTS pair, which has every word twice, is not among them."""

    documents: int = 0
    text_tokens: int = 0
    speech_tokens: int = 0
    words: int = 0
    spoken_words: int = 0


@dataclass(kw_only=True)
class Statistics:
    """Added up document by document. `ends`: how many words, silences and pieces end, by `UnitEnd`; `marked_tokens`: speech
    tokens of the runs that know them. Lengths of documents and runs in tokens, of spoken runs also in words."""

    sources: dict[str, Source] = field(default_factory=dict)
    ends: np.ndarray = field(default_factory=lambda: np.zeros(len(UnitEnd), dtype=np.int64))
    marked_tokens: int = 0
    documents: Lengths = field(default_factory=Lengths)
    text_runs: Lengths = field(default_factory=Lengths)
    speech_runs: Lengths = field(default_factory=Lengths)
    speech_run_words: Lengths = field(default_factory=Lengths)
    units: Lengths = field(default_factory=Lengths)

    def add(self, document: Document, text: str) -> None:
        """One document and the original text behind it."""
        source = self.sources.setdefault(document.source, Source())
        source.documents += 1
        source.text_tokens += document.num_tokens("text")
        source.speech_tokens += document.num_tokens("speech")
        self.documents.add(document.num_tokens())
        words = [self._add_run(segment) for segment in document.segments]
        speech = [n for n, segment in zip(words, document.segments) if segment.modality == "speech"]
        if 0 < len(speech) < len(words) and None not in speech and not _is_pair(document):
            source.words += len(split_words(text))
            source.spoken_words += sum(n for n in speech if n is not None)

    def _add_run(self, segment: Segment) -> int | None:
        """Count one run; returns the words of a spoken one that knows them."""
        if segment.modality == "text":
            self.text_runs.add(len(segment.ids_T))
            return None
        self.speech_runs.add(len(segment.ids_T))
        if segment.unit_end_T is None:
            return None
        ends = np.bincount(segment.unit_end_T, minlength=len(UnitEnd))
        self.ends += ends
        self.marked_tokens += len(segment.ids_T)
        closed = np.flatnonzero((segment.unit_end_T == UnitEnd.WORD) | (segment.unit_end_T == UnitEnd.SILENCE)).tolist()
        for length, times in Counter(end - before for before, end in zip([-1, *closed], closed)).items():
            self.units.add(length, times)
        self.speech_run_words.add(int(ends[UnitEnd.WORD]))
        return int(ends[UnitEnd.WORD])

    def summary(self, frame_rate: float | None) -> dict[str, Any]:
        """Everything as plain JSON data; `frame_rate` in speech tokens per second turns tokens into seconds."""
        sources = self.sources.values()
        text, speech = sum(s.text_tokens for s in sources), sum(s.speech_tokens for s in sources)
        words, units = int(self.ends[UnitEnd.WORD]), int(self.ends[UnitEnd.WORD] + self.ends[UnitEnd.SILENCE])
        per_word = _ratio(self.marked_tokens, words)
        return {
            "documents": sum(s.documents for s in sources),
            "tokens": {"text": text, "speech": speech},
            "speech_seconds": None if frame_rate is None else speech / frame_rate,
            "sources": {name: vars(s) | {"ratio": _ratio(s.spoken_words, s.words)} for name, s in self.sources.items()},
            "ratio": _ratio(sum(s.spoken_words for s in sources), sum(s.words for s in sources)),
            "speech_words": words,
            "speech_tokens_per_word": per_word,
            "words_per_second": None if frame_rate is None or not per_word else frame_rate / per_word,
            "units": {"words": words, "silences": units - words, "pieces": int(self.ends[UnitEnd.PIECE])},
            "tokens_per_unit": _ratio(self.marked_tokens, units),
            "lengths": {name: lengths.summary() for name, lengths in self.lengths().items()},
        }

    def lengths(self) -> dict[str, Lengths]:
        return {
            "document_tokens": self.documents,
            "text_run_tokens": self.text_runs,
            "speech_run_tokens": self.speech_runs,
            "speech_run_words": self.speech_run_words,
            "speech_unit_tokens": self.units,
        }


def inspect(
    path: Path,
    samples: int | None = None,
    *,
    tokenizer: Path | None = None,
    page: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print statistics of all documents and `samples` of them, evenly spaced (3; 12 with a `page`, and none as JSON).

    `tokenizer`: the run folder of the speech tokenizer that made the shards; it gives seconds, spells text tokens and reads
    speech tokens back. `page`: where to write the samples as HTML. Raises ValueError when the tokenizer is another one or a
    shard is damaged.
    """
    folder = open_shards(path)
    reader = None if tokenizer is None else _Reader(folder, tokenizer)
    wanted = samples if samples is not None else PAGE_SAMPLES if page else 0 if as_json else SAMPLES
    statistics, chosen = read(folder, wanted)
    summary = {**_made(folder), **statistics.summary(reader.frame_rate if reader else None)}
    if as_json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    else:
        _print(path, summary)
        for document, text in chosen if page is None else []:
            _print_sample(document, text)
    if page is not None:
        shown = [_sample(item, text, reader) for item, text in chosen]
        write_shard_page(page, str(path), summary, {k: v.counts for k, v in statistics.lengths().items()}, shown)
        if not as_json:
            print(f"page     {page}")


def read(
    folder: ShardFolder | SpokenFolder, samples: int
) -> tuple[Statistics, list[tuple[Document | AlignedTokens, str]]]:
    """One pass over the folder: statistics of all documents, and `samples` of them, evenly spaced, with their texts."""
    wanted = set(np.linspace(0, len(folder) - 1, min(samples, len(folder)), dtype=int).tolist())
    statistics, chosen = Statistics(), []
    items: Iterator[tuple[Document | AlignedTokens, str]] = folder.with_texts()
    for i, (item, text) in enumerate(items):
        statistics.add(_whole(item), text)
        if i in wanted:
            chosen.append((item, text))
    return statistics, chosen


class _Reader:
    """The tokenizer behind the shards, for what ids alone do not tell."""

    def __init__(self, folder: ShardFolder | SpokenFolder, tokenizer: Path) -> None:
        loaded: SpeechTokenizer = load(tokenizer)
        if loaded.fingerprint != folder.info.speech_fingerprint:
            raise ValueError(
                f"--tokenizer {tokenizer} is {loaded.fingerprint!r}, but {folder.folder} was made with the speech "
                f"tokenizer {folder.info.speech_fingerprint!r}; give that one, or leave --tokenizer out"
            )
        self.frame_rate = loaded.frame_rate
        texts = loaded.text_tokenizer if isinstance(loaded, SupervisedTokenizer) else None
        self._asr = loaded if isinstance(loaded, SupervisedTokenizer) and texts is not None else None
        self._texts = texts if texts and text_fingerprint(texts) == folder.info.text_fingerprint else None

    def spell(self, ids_T: np.ndarray) -> str:
        """Text of text tokens; "" when they are of another text tokenizer than the speech tokenizer's own."""
        return "" if self._texts is None else self._texts.decode(ids_T.tolist())

    def hear(self, tokens: Sequence[np.ndarray]) -> Sequence[str | None]:
        """What the ASR head reads in each run of speech tokens, None when there is no such head."""
        if self._asr is None:
            return [None] * len(tokens)
        return self._asr.read_back([ids_T.copy() for ids_T in tokens])  # torch wants arrays that it may write to


def _made(folder: ShardFolder | SpokenFolder) -> dict[str, Any]:
    """What the folder says about itself; `stage` is the maker's own count, `noise` its word error rates."""
    stats = folder.folder / STATS
    stage = json.loads(stats.read_text(encoding="utf-8")) if stats.is_file() else {}
    return {
        "folder": str(folder.folder),
        "kind": folder.kind.name,
        "info": vars(folder.info),
        "rejects": folder.manifest["rejects"],
        "stage": {key: value for key, value in stage.items() if key not in ("noise", "noise_rates")},
        "noise": noise.report(stage.get("noise") or {}),
    }


def _print(path: Path, found: dict[str, Any]) -> None:
    info, tokens = found["info"], found["tokens"]
    print(f"{path}: {found['documents']} documents, made by {info['made_by']}")
    text = f"{info['text_fingerprint']} ({info['num_text']} ids)" if info["text_fingerprint"] else "that of the run"
    print(f"text tokenizer {text}, speech tokenizer {info['speech_fingerprint']} ({info['num_speech']} ids)")
    for name, source in found["sources"].items():
        ratio = "" if source["ratio"] is None else f", {source['ratio']:.1%} of the words are speech"
        print(
            f"  {name}: {source['documents']} documents, {source['text_tokens']} text and "
            f"{source['speech_tokens']} speech tokens{ratio}"
        )
    for key, counts in (("rejects", found["rejects"]), *_reasons(found["stage"])):
        if counts:
            print(f"{key:<12} " + ", ".join(f"{reason}: {n}" for reason, n in counts.items()))
    print(f"tokens       text {tokens['text']}, speech {tokens['speech']}" + _hours(found["speech_seconds"]))
    for name, of in found["lengths"].items():
        if of["n"]:
            quantiles = ", ".join(f"{q} % {of[f'p{q}']}" for q in QUANTILES)
            print(f"{name:<18} mean {of['mean']:.1f}, {quantiles}, most {of['most']}  (n {of['n']})")
    if "ratio" in found["stage"]:
        print(f"spoken share of all words, by the stage that made them: {found['stage']['ratio']:.4f}")
    if found["speech_tokens_per_word"]:
        rate = f", {found['words_per_second']:.2f} words per second" if found["words_per_second"] else ""
        print(f"speech tokens per word {found['speech_tokens_per_word']:.2f}{rate}")
    if found["tokens_per_unit"]:
        units = found["units"]
        print(
            f"speech units {units['words']} words and {units['silences']} silences, {found['tokens_per_unit']:.2f} tokens each"
        )
    for kind, of in found["noise"].items():
        print(
            f"noise {kind:<8} WER {of['wer']:.1%} ({of['low']:.1%} to {of['high']:.1%}; {of['spans']} spans, {of['words']} words)"
        )


def _reasons(stage: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    """The counted reasons of the stage that made the folder."""
    return [("spans left", stage.get("rejects") or {}), ("unspeakable", stage.get("unspeakable") or {})]


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f" ({seconds / 3600:.2f} hours)"


def _print_sample(item: Document | AlignedTokens, text: str) -> None:
    document = _whole(item)
    print(f"\n{document.id} ({document.source})\n  {text}")
    for segment in document.segments:
        print(f"  <{segment.modality}> {_shown(segment)}")


def _shown(segment: Segment) -> str:
    """Ids with a bar after each word or silence."""
    ends_T = segment.unit_end_T if segment.unit_end_T is not None else np.zeros(len(segment.ids_T), dtype=np.uint8)
    return " ".join(f"{i}|" if end else str(i) for i, end in zip(segment.ids_T.tolist(), ends_T.tolist()))


def _whole(item: Document | AlignedTokens) -> Document:
    return (
        Document(id=item.id, source="parallel", segments=(item.segment(),)) if isinstance(item, AlignedTokens) else item
    )


def _sample(item: Document | AlignedTokens, text: str, reader: _Reader | None) -> Sample:
    """One document for the page: its runs with their words, as far as they can be known."""
    document = _whole(item)
    speech = [segment.ids_T for segment in document.segments if segment.modality == "speech"]
    heard = iter(reader.hear(speech) if reader else [None] * len(speech))
    spelled = [reader.spell(s.ids_T) if reader and s.modality == "text" else "" for s in document.segments]
    runs = []
    for segment, own, spoken in zip(document.segments, spelled, span_texts(document, text, spelled)):
        if segment.modality == "text":
            runs.append(Run(modality="text", text=own, num_tokens=len(segment.ids_T)))
        else:
            words = _heard_words(item) if isinstance(item, AlignedTokens) else _said(spoken, text, _num_words(segment))
            units = units_of(segment, words)
            runs.append(
                Run(modality="speech", text=spoken, num_tokens=len(segment.ids_T), units=units, heard=next(heard))
            )
    return Sample(id=document.id, source=document.source, text=text, runs=runs)


def _heard_words(item: AlignedTokens) -> list[str]:
    """The words that have tokens; a very short one may have none."""
    return [item.words[k] for k in np.unique(item.word_T[item.word_T != SILENCE]).tolist()]


def _said(written: str, text: str, num_words: int | None) -> list[str]:
    """The words of a spoken run: as written where their number fits, else as spoken ("42" is two words); `text` is around."""
    if num_words is not None and len(written.split()) != num_words:
        try:
            return verbalise(written, language_of(text, LANGUAGES)).split()
        except ImportError:  # without the extra `speaking` such a run stays without names
            return []
    return written.split()


def span_texts(document: Document, text: str, spelled: Sequence[str]) -> list[str]:
    """The written words behind each segment that is speech, "" where they cannot be told.

    `spelled`: the text of each text segment, "" for speech and when unknown. The text segments are looked up in the original
    `text`, in order; what lies between them was spoken. A pair, or speech alone, of as many words as the text speaks all of it.
    """
    speech = [k for k, segment in enumerate(document.segments) if segment.modality == "speech"]
    found = [""] * len(document.segments)
    alone = len(document.segments) == 1 or _is_pair(document)
    if alone and len(speech) == 1 and _num_words(document.segments[speech[0]]) == len(text.split()):
        found[speech[0]] = text.strip()
        return found
    num_words = [_num_words(segment) for segment in document.segments]
    return _between(text, spelled, num_words) or _between(text, spelled, [None] * len(found)) or found


def _between(text: str, spelled: Sequence[str], num_words: Sequence[int | None]) -> list[str]:
    """The parts of `text` between the spelled ones, each of so many words where a number is given; [] when there are none.

    Looks from left to right for the first place of each spelled text, and never back.
    """
    text, done, found = text.strip(), 0, [""] * len(spelled)
    waiting: int | None = None  # the spoken segment before the next spelled one
    for k, own in enumerate(spelled):
        if not own and waiting is not None:
            return []  # nothing says where the first of two spoken ones ends
        if not own:
            waiting = k
            continue
        at = done + len(text[done:]) - len(text[done:].lstrip())
        if waiting is not None:
            at = _next_place(text, own, at, num_words[waiting], last=k + 1 == len(spelled))
            found[waiting] = text[done:at].strip() if at >= 0 else ""
            waiting = None
        if at < 0 or not text.startswith(own, at):
            return []
        done = at + len(own)
    if waiting is not None:
        found[waiting] = text[done:].strip()
    return found if waiting is None or _fits(found[waiting], num_words[waiting]) else []


def _next_place(text: str, own: str, start: int, num_words: int | None, last: bool) -> int:
    """Where `own` next stands after a spoken part that begins at `start`, -1 when nowhere; the `last` ends the text."""
    at = start
    for word in split_words(text[start:]):
        begin = at + len(word) - len(word.lstrip())
        ends = not last or begin + len(own) == len(text)
        if ends and text.startswith(own, begin) and _fits(text[start:begin], num_words):
            return begin
        at += len(word)
    return -1


def _fits(spoken: str, num_words: int | None) -> bool:
    return bool(spoken.strip()) and num_words in (None, len(spoken.split()))


def _is_pair(document: Document) -> bool:
    """ASR or TTS: one side is only context, and every word is there twice, once in each modality."""
    return not all(segment.loss for segment in document.segments)


def _num_words(segment: Segment) -> int | None:
    return None if segment.unit_end_T is None else int(np.count_nonzero(segment.unit_end_T == UnitEnd.WORD))


def units_of(segment: Segment, words: Sequence[str]) -> list[Unit]:
    """The words and silences of a spoken run with their tokens; named when there are as many `words` as word ends.

    Tokens after the last end, or all of a run without ends, are one unit of unknown kind.
    """
    if segment.unit_end_T is None:
        return [Unit(kind="unknown", ids_T=segment.ids_T.tolist())] if len(segment.ids_T) else []
    names = iter(words if len(words) == _num_words(segment) else [])
    units: list[Unit] = []
    ids: list[int] = []
    pieces: list[int] = []
    for i, end in zip(segment.ids_T.tolist(), segment.unit_end_T.tolist()):
        ids.append(i)
        if end == UnitEnd.PIECE:
            pieces.append(len(ids))
        elif end != UnitEnd.NONE:
            word = end == UnitEnd.WORD
            text = next(names, "") if word else ""
            units.append(Unit(kind="word" if word else "silence", ids_T=ids, text=text, pieces=pieces))
            ids, pieces = [], []
    return [*units, Unit(kind="unknown", ids_T=ids, pieces=pieces)] if ids else units


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
