"""What a folder of shards holds, added up document by document: tokens, words, lengths of documents, runs and units."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from speechquilt.data.interleaving.synthetic import split_words
from speechquilt.reports.spoken_runs import is_pair
from speechquilt.types import Document, Segment, UnitEnd

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
        if 0 < len(speech) < len(words) and None not in speech and not is_pair(document):
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


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
