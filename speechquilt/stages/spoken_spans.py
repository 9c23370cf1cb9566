"""Word errors of spans by their length: a text-to-token model's tokens, and recorded tokens of the very same words.

Interleaving asks for spans, so they are drawn as it draws them: from running text, 1 to 15 words.
Trap: the reader hears a span without what stood before it and makes mistakes of its own, most on one word alone. What recorded
tokens of the same span read as is the floor; only what lies above it is the text-to-token model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechquilt.evals.error_rates import error_rate, rate_measures, rate_results
from speechquilt.evals.measures import Chart, Promise, Value, at_most
from speechquilt.evals.noise import TokenReader
from speechquilt.protocols import TextToToken
from speechquilt.stages.train_text_to_token import SPAN_CLASSES
from speechquilt.types import AlignedTokens

GENERATED, RECORDED = "generated", "recorded"
SENTENCE = "sentence"
LIMIT = 0.15
WORDS = {"1_3": "1-3 words", "4_9": "4-9 words", "10_plus": "10 words and more", SENTENCE: "whole sentences"}

MEASURES = rate_measures(
    "text_to_token.spans.<length>.<by>",
    "tokens of spans read back",
    promise=Promise(
        name="Text-to-token, <length>: word error rate",
        bound=at_most(LIMIT),
        where={"length": tuple(WORDS), "by": (GENERATED,)},
        words=WORDS,
    ),
    chart=Chart(title="Spans read back wrong, by length", series="by", words=WORDS),
)


@dataclass(frozen=True, kw_only=True)
class RecordedSpan:
    """A run of a recording's words, and its tokens."""

    text: str
    ids_T: np.ndarray


def measure_spans(
    engine: TextToToken, reader: TokenReader, recordings: Sequence[AlignedTokens], number: int, seed: int = 0
) -> dict[str, Value]:
    """`text_to_token.spans.<length>.<by>.*`: `number` spans of each length out of held-out recordings, and those whole.

    A length that no recording has is left out. A text that the engine rejects counts as silence: every one of its words is an
    error.
    """
    lengths = {name: draw_spans(recordings, low, high, number, seed) for name, (low, high) in SPAN_CLASSES.items()}
    lengths[SENTENCE] = [RecordedSpan(text=tokens.text, ids_T=tokens.ids_T) for tokens in recordings]
    found: dict[str, Value] = {}
    for length, spans in lengths.items():
        if not spans:
            continue
        texts = [span.text for span in spans]
        spoken = engine.generate(texts, range(len(texts)))
        tokens = {
            GENERATED: [span.ids_T[: 0 if span.reject else None] for span in spoken],
            RECORDED: [span.ids_T for span in spans],
        }
        for by, ids in tokens.items():
            found |= rate_results(f"text_to_token.spans.{length}.{by}", error_rate(zip(texts, reader.read_back(ids))))
    return found


def draw_spans(recordings: Sequence[AlignedTokens], low: int, high: int, number: int, seed: int) -> list[RecordedSpan]:
    """`number` runs of `low` to `high` words from recordings with word times and as many words, drawn with replacement: a length, a
    recording that has it, a place. [] where there is none."""
    timed = [tokens for tokens in recordings if tokens.has_word_times]
    longest = max((len(tokens.words) for tokens in timed), default=0)
    if longest < low:
        return []
    rng = np.random.default_rng([seed, low])
    spans = []
    for _ in range(number):
        length = int(rng.integers(low, min(high, longest) + 1))
        fitting = [tokens for tokens in timed if len(tokens.words) >= length]
        tokens = fitting[int(rng.integers(len(fitting)))]
        spans.append(cut(tokens, int(rng.integers(len(tokens.words) - length + 1)), length))
    return spans


def cut(tokens: AlignedTokens, first: int, length: int) -> RecordedSpan:
    """These words of a recording: their tokens and the silences between them, none around."""
    own_T = np.flatnonzero((tokens.word_T >= first) & (tokens.word_T < first + length))
    ids_T = tokens.ids_T[own_T[0] : own_T[-1] + 1] if len(own_T) else tokens.ids_T[:0]
    return RecordedSpan(text=" ".join(tokens.words[first : first + length]), ids_T=ids_T)
