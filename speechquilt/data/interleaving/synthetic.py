"""Synthetic interleaving: choose spans of a text document that will be spoken, then put their speech tokens in.

`plan` (no model) -> a text-to-token model speaks `plan.spoken_spans` -> `assemble` (no model). Spec
synthetic-interleaved, 5.2.
Trap: the ratio counts *input words*, not output tokens; at 12.5 Hz about 60 % of the finished sequence is speech.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from speechquilt.config import fingerprint
from speechquilt.data.interleaving.placement import Run, draw_lengths, place_anywhere, place_in_runs
from speechquilt.data.interleaving.speakable import language_of, scripts_of, unspeakable_words
from speechquilt.data.interleaving.verbalise import verbalise
from speechquilt.span_length import LEAST, MOST, USUAL_RATE, at_rate, misfit
from speechquilt.types import Document, Modality, Segment, SpokenSpan

# Han, kana: written without spaces, so that without a segmenter every character counts as a word.
_CHARACTER = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
_CLOSING = "[\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\u2026\u300d\u300f\u3011\uff09]*"
_WORD = re.compile(rf"\s*(?:{_CHARACTER}|(?:(?!{_CHARACTER})\S)+){_CLOSING}")


class Piece(NamedTuple):
    """A run of a document in one modality; `text` still has its white space."""

    modality: Modality
    text: str


@dataclass(frozen=True, kw_only=True)
class InterleavePlan:
    """Which runs of a document are to be spoken."""

    document_id: str
    """Id of the text document."""
    pass_index: int
    """Which pass over the corpus, from 0; every pass draws other spans."""
    seed: int
    """Of this document in this pass, for whatever else is drawn for it."""
    pieces: tuple[Piece, ...]
    """The document cut into text and speech; their texts joined are the document, byte for byte."""
    language: str = "en"
    """What the spans are spoken in."""
    unspeakable: Counter[str] = field(default_factory=Counter)
    """Number of words that could not be chosen, by reason (`speakable.REASONS`)."""

    @property
    def spans(self) -> tuple[str, ...]:
        """The texts that become speech as they are written, in order, without the white space around them."""
        return tuple(piece.text.strip() for piece in self.pieces if piece.modality == "speech")

    @cached_property
    def spoken_spans(self) -> tuple[str, ...]:
        """What an engine is to say for each of `spans`: numbers, units and abbreviations as words."""
        return tuple(verbalise(span, self.language) for span in self.spans)


@dataclass(frozen=True, kw_only=True)
class InterleaveConfig:
    """Which words of a text become speech (spec synthetic-interleaved, 5.2)."""

    ratio: float = 0.3
    """Share of a document's words that become speech, 0 to 0.5; the paper uses 0.3."""
    poisson_mean: float = 10.0
    """Mean length of a spoken span in words, at least 1; lengths follow a Poisson distribution."""
    character_mean: float = 16.0
    """Mean length of a span where most words are Han or kana characters, in characters; at least 1."""
    min_words: int = 20
    """A document of fewer words stays text."""
    seed: int = 0
    """Decides which spans are drawn; another seed speaks other words of the same texts."""
    languages: tuple[str, ...] = ("en", "zh")
    """Codes of the languages that the text-to-token model speaks, such as en, zh or ja. Words in scripts of none of
    them stay text.
    """

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        for key in ("poisson_mean", "character_mean"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1 word; the paper's recipe uses 10")
        if self.min_words < 1:
            raise ValueError(f"min_words={self.min_words} must be at least 1")
        if not self.languages:
            raise ValueError("languages=() must name what the text-to-token model speaks, for example en")
        for language in self.languages:
            scripts_of(language)


@dataclass(kw_only=True)
class InterleaveStats:
    """Adds up what `assemble` did over many documents."""

    words: int = 0
    """Words of all documents."""
    spoken_words: int = 0
    """Words that became speech."""
    spans: int = 0
    """Spans that were to be spoken."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Spans that stayed text after all, by reason."""
    unspeakable: Counter[str] = field(default_factory=Counter)
    """Words that were never chosen, by reason."""

    @property
    def ratio(self) -> float:
        """The realised share of words that became speech."""
        return self.spoken_words / max(1, self.words)

    @property
    def speakable_ratio(self) -> float:
        """The same share, of the words that could be spoken."""
        return self.spoken_words / max(1, self.words - self.unspeakable.total())


def split_words(text: str) -> list[str]:
    """Words, each with the white space before it (the last also with what follows); joined they are the text again.

    A Han or kana character is a word of its own. White space alone gives no word.
    """
    starts = list(word_starts(text))
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


def word_starts(text: str) -> Iterator[int]:
    """Where each of `split_words` begins, found as it is asked for: a text may be larger than its words would be in memory."""
    # Without the white space at its end, which the pattern would try again from every place in it.
    for number, match in enumerate(_WORD.finditer(text, 0, len(text.rstrip()))):
        yield match.start() if number else 0


def choose_spans(
    num_words: int, rng: np.random.Generator, ratio: float = 0.3, poisson_mean: float = 10
) -> list[tuple[int, int]]:
    """Word ranges [start, end) to speak, in order: exactly round(ratio x num_words) words, at least one word apart.

    Lengths are Poisson without zeros, the last one shortened; every placement of the spans is equally likely (spec 1, 5.2
    steps 2-4). Raises ValueError for a ratio above 0.5, where spans could no longer be kept apart.
    """
    _check_ratio(ratio)
    lengths = draw_lengths(_num_spoken(num_words, ratio), rng, poisson_mean)
    return place_anywhere(lengths, num_words, rng)


def choose_speakable_spans(
    speakable_W: np.ndarray, rng: np.random.Generator, ratio: float = 0.3, poisson_mean: float = 10
) -> list[tuple[int, int]]:
    """`choose_spans` over the words that may be spoken (bool per word); the same draw when all of them may.

    round(ratio x all words) are spoken, but at most half of those that may be, so that text stays between the spans.
    """
    if speakable_W.all():
        return choose_spans(len(speakable_W), rng, ratio, poisson_mean)
    _check_ratio(ratio)
    num_spoken = min(_num_spoken(len(speakable_W), ratio), int(speakable_W.sum()) // 2)
    return place_in_runs(num_spoken, runs_of(speakable_W), rng, poisson_mean)


def runs_of(speakable_W: np.ndarray) -> list[Run]:
    """The runs of words that may be spoken, in order."""
    edges = np.flatnonzero(np.diff(speakable_W.astype(np.int8), prepend=0, append=0)).tolist()
    return [Run(start, end - start) for start, end in zip(edges[::2], edges[1::2])]


def plan(document_id: str, text: str, pass_index: int, config: InterleaveConfig) -> InterleavePlan:
    """Choose the spans of one document for one pass over the corpus; a pure function of its arguments.

    White space between text and speech stays with the text. A document below `min_words` stays text. Words that nobody can
    read aloud are never chosen (`choose_speakable_spans` says what that does to the ratio).
    """
    seed = int(fingerprint([document_id, pass_index, config.seed]), 16)
    words = split_words(text)
    reasons = unspeakable_words(words, config.languages)
    spans: list[tuple[int, int]] = []
    if len(words) >= config.min_words:
        characters = sum(re.match(rf"\s*{_CHARACTER}", word) is not None for word in words)
        mean = config.character_mean if 2 * characters > len(words) else config.poisson_mean
        speakable_W = np.array([not reason for reason in reasons])
        spans = choose_speakable_spans(speakable_W, np.random.default_rng(seed), config.ratio, mean)
    return InterleavePlan(
        document_id=document_id,
        pass_index=pass_index,
        seed=seed,
        pieces=tuple(_pieces(text, words, spans)),
        language=language_of(text, config.languages),
        unspeakable=Counter(reason for reason in reasons if reason),
    )


def assemble(
    plan: InterleavePlan,
    spoken: Sequence[SpokenSpan],
    text_encode: Callable[[str], Sequence[int]],
    *,
    frame_rate: float = USUAL_RATE,
    source: str = "interleaved",
    stats: InterleaveStats | None = None,
    engine_encode: Callable[[str], Sequence[int]] | None = None,
) -> Document:
    """Put the speech tokens of `plan.spoken_spans` into their places.

    A span that `reject_reason` refuses stays text and joins the text around it. Every text run is encoded on its own,
    by `text_encode` (`TextTokenizer.encode_run`), with the white space around it. `frame_rate`: speech tokens per second. `stats`, if given, is added to. `engine_encode`: text -> ids
    of the model that spoke, which judge the length of a span; None: those of `text_encode`.
    Raises ValueError when `spoken` does not have one entry per span.
    """
    num_spans = sum(piece.modality == "speech" for piece in plan.pieces)
    if len(spoken) != num_spans:
        raise ValueError(
            f"{plan.document_id}: {len(spoken)} spoken spans for {num_spans} planned ones; give one for each"
        )
    stats = InterleaveStats() if stats is None else stats
    stats.unspeakable.update(plan.unspeakable)
    said_encode = engine_encode or text_encode
    runs: list[str | SpokenSpan] = []
    spans = iter(zip(spoken, plan.spoken_spans))
    for piece in plan.pieces:
        stats.words += len(split_words(piece.text))
        if piece.modality == "text":
            run: str | SpokenSpan = piece.text
        else:
            span, said = next(spans)
            run = _counted(piece, span, reject_reason(span, len(said_encode(said)), frame_rate), stats)
        if isinstance(run, str) and runs and isinstance(runs[-1], str):
            runs[-1] += run
        else:
            runs.append(run)
    return Document(
        id=f"{plan.document_id}/pass{plan.pass_index}",
        source=source,
        segments=tuple(_segment(run, text_encode) for run in runs if not isinstance(run, str) or run.strip()),
    )


def _counted(piece: Piece, span: SpokenSpan, reason: str, stats: InterleaveStats) -> str | SpokenSpan:
    """The span, or the text that it stands for when there is a reason to refuse it; either is counted."""
    stats.spans += 1
    if reason:
        stats.rejects[reason] += 1
        return piece.text
    stats.spoken_words += len(split_words(piece.text))
    return span


def reject_reason(span: SpokenSpan, num_text: int, frame_rate: float = USUAL_RATE) -> str:
    """Why a spoken span may not be used, "" when it may (spec 1, 5.2 step 5); `num_text` text tokens were spoken."""
    if span.reject:
        return span.reject
    if len(span.ids_T) == 0:
        return "no speech tokens"
    least, most = at_rate(LEAST, frame_rate), at_rate(MOST, frame_rate)
    found = misfit(len(span.ids_T), num_text, least, most)
    bound = {"few": f"fewer than {least:g}", "many": f"more than {most:g}"}
    return f"{bound[found]} speech tokens per text token" if found else ""


def _num_spoken(num_words: int, ratio: float) -> int:
    return int(ratio * num_words + 0.5)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 0.5:
        raise ValueError(
            f"ratio={ratio} must be between 0 and 0.5, or spans could not be kept apart; the paper uses 0.3"
        )


def _pieces(text: str, words: list[str], spans: list[tuple[int, int]]) -> list[Piece]:
    """Cut `text` at the spans, moving the cut before a span behind the white space that belongs to the text."""
    if not words:
        return [Piece("text", text)] if text else []
    starts = np.cumsum([0] + [len(word) for word in words])
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        a, b = int(starts[start]), int(starts[end])
        if start:  # at the start of the document there is no text to hold the white space
            a += len(words[start]) - len(words[start].lstrip())
            pieces.append(Piece("text", text[done:a]))
        pieces.append(Piece("speech", text[a:b]))
        done = b
    if done < len(text):
        pieces.append(Piece("text", text[done:]))
    return pieces


def _segment(run: str | SpokenSpan, text_encode: Callable[[str], Sequence[int]]) -> Segment:
    if isinstance(run, str):
        return Segment(modality="text", ids_T=np.asarray(text_encode(run), dtype=np.int32))
    return Segment(modality="speech", ids_T=np.asarray(run.ids_T, dtype=np.int32), unit_end_T=run.unit_end_T)
