"""`speechquilt inspect`: what is in a folder of shards, as numbers, as readable documents, and as a page.

Trap: the folder holds ids, not a tokenizer. Without one, speech is shown by its ids and text by its number of tokens, with the
original text beside them. Spoken texts are shown whole: their blocks are drawn when a run loads them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder, open_shards
from speechquilt.evals import noise
from speechquilt.jobs.bulk import STATS
from speechquilt.reports import charts
from speechquilt.reports.shard_page import Run, Sample, write_shard_page
from speechquilt.reports.shard_statistics import QUANTILES, Statistics
from speechquilt.reports.spoken_runs import count_words, said, span_texts, units_of
from speechquilt.stages.encode import load_text_tokenizer, own_text_tokenizer
from speechquilt.stages.training_documents import text_fingerprint
from speechquilt.tokenizer.loading import load
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import SILENCE, AlignedTokens, Document, Segment

SAMPLES, PAGE_SAMPLES = 3, 12


def inspect(
    path: Path,
    samples: int | None = None,
    *,
    tokenizer: Path | None = None,
    text_tokenizer: Path | None = None,
    page: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print statistics of all documents and `samples` of them, evenly spaced (3; 12 with a `page`, and none as JSON).

    `tokenizer`: the folder of the speech tokenizer that made the shards; it gives seconds, and one of ours spells text tokens
    and reads speech tokens back. `text_tokenizer`: what spells text tokens instead. `page`: where to write the samples as HTML. Raises ValueError when a tokenizer is another one or a
    shard is damaged.
    """
    if page is not None:
        charts.require()  # before a pass that may take hours
    folder = open_shards(path)
    reader = _Reader(folder, tokenizer, text_tokenizer) if tokenizer or text_tokenizer else None
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
    """The tokenizers behind the shards, for what ids alone do not tell. `frame_rate`: None when no speech tokenizer is given."""

    def __init__(
        self, folder: ShardFolder | SpokenFolder, tokenizer: Path | None, text_tokenizer: Path | None = None
    ) -> None:
        speech = load(tokenizer) if tokenizer else None
        given = load_text_tokenizer(text_tokenizer) if text_tokenizer else None
        for name, flag, path, fingerprint, expected in (
            ("speech", "--tokenizer", tokenizer, speech and speech.fingerprint, folder.info.speech_fingerprint),
            (
                "text",
                "--text-tokenizer",
                text_tokenizer,
                given and text_fingerprint(given),
                folder.info.text_fingerprint,
            ),
        ):
            if fingerprint and expected and fingerprint != expected:
                raise ValueError(
                    f"{flag} {path} is {fingerprint!r}, but {folder.folder} was made with the {name} "
                    f"tokenizer {expected!r}; give that one, or leave {flag} out"
                )
        self.frame_rate = speech.frame_rate if speech else None
        own = own_text_tokenizer(speech) if speech else None
        self._asr = speech if isinstance(speech, SupervisedTokenizer) and own is not None else None
        texts = given or own
        self._texts = texts if texts and text_fingerprint(texts) == folder.info.text_fingerprint else None

    def spell(self, ids_T: np.ndarray) -> str:
        """Text of text tokens; "" when they are of another text tokenizer than the one at hand."""
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
            words = _heard_words(item) if isinstance(item, AlignedTokens) else said(spoken, text, count_words(segment))
            units = units_of(segment, words)
            runs.append(
                Run(modality="speech", text=spoken, num_tokens=len(segment.ids_T), units=units, heard=next(heard))
            )
    return Sample(id=document.id, source=document.source, text=text, runs=runs)


def _heard_words(item: AlignedTokens) -> list[str]:
    """The words that have tokens; a very short one may have none."""
    return [item.words[k] for k in np.unique(item.word_T[item.word_T != SILENCE]).tolist()]
