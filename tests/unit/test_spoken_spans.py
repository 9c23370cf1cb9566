"""Spans by length: the recorded tokens of a span are its own, and a text-to-token model that has learned them reads as they do."""

import numpy as np
import pytest

from speechquilt.evals.results import Schema
from speechquilt.stages.spoken_spans import MEASURES, WORDS, cut, draw_spans, measure_spans
from speechquilt.types import AlignedTokens, SpokenSpan
from tests.contracts.tiny_tokenizer import build

NAMES = [f"w{i}" for i in range(12)]


def recording(seed: int) -> AlignedTokens:
    """Silence, then words of three tokens with a silence behind every second."""
    word_T = [-1]
    for word in range(len(NAMES)):
        word_T += [word] * 3 + [-1] * (word % 2)
    ids_T = np.random.default_rng(seed).integers(0, 24, len(word_T)).astype(np.int32)
    return AlignedTokens(id=str(seed), text=" ".join(NAMES), words=tuple(NAMES), ids_T=ids_T, word_T=np.array(word_T))


def test_a_span_is_its_words_and_the_silence_between_them():
    tokens = recording(0)
    span = cut(tokens, 1, 2)
    assert span.text == "w1 w2"
    assert span.ids_T.tolist() == tokens.ids_T[4:11].tolist()  # w1, silence, w2
    assert cut(tokens, 0, 1).ids_T.tolist() == tokens.ids_T[1:4].tolist()


def test_spans_have_the_lengths_of_their_class_and_come_again():
    recordings = [recording(i) for i in range(3)]
    for low, high in ((1, 3), (4, 9), (10, 15)):
        spans = draw_spans(recordings, low, high, 60, seed=1)
        lengths = {len(span.text.split()) for span in spans}
        assert lengths == set(range(low, min(high, len(NAMES)) + 1))
        again = draw_spans(recordings, low, high, 60, seed=1)
        assert [s.text for s in again] == [s.text for s in spans]
    assert draw_spans(recordings, 13, 15, 60, seed=1) == []
    whole = AlignedTokens(id="x", text="a b", words=("a b",), ids_T=np.zeros(3, int), word_T=np.zeros(3, int))
    assert draw_spans([whole], 1, 3, 5, seed=0) == []


class Replay:
    """An engine that knows the recordings by heart, and refuses what it is told to."""

    frame_rate = 12.5

    def __init__(self, recordings, refused=()):
        self.recordings, self.refused = recordings, refused

    def generate(self, texts, seeds):
        return [self._say(text) for text in texts]

    def _say(self, text):
        first, length = NAMES.index(text.split()[0]), len(text.split())
        ids_T = self.recordings[0].ids_T if length == len(NAMES) else cut(self.recordings[0], first, length).ids_T
        return SpokenSpan(ids_T=ids_T, unit_end_T=np.zeros(len(ids_T)), reject="loop" if length in self.refused else "")


def test_every_length_has_both_rates_and_equal_tokens_read_equally():
    recordings, reader = [recording(0)], build(seed=3)
    found = measure_spans(Replay(recordings), reader, recordings, 10)
    Schema(MEASURES).check(found)
    for length in WORDS:
        rates = [
            {k.rpartition(".")[2]: v for k, v in found.items() if k.startswith(f"text_to_token.spans.{length}.{by}.")}
            for by in ("generated", "recorded")
        ]
        assert rates[0] == rates[1]
        assert rates[0]["n"] == (1 if length == "sentence" else 10)
    assert {v.target for v in Schema(MEASURES).verdicts(found)} == {"≤ 15 %"}


def test_a_refused_span_is_all_of_its_words():
    recordings, reader = [recording(0)], build(seed=3)
    found = measure_spans(Replay(recordings, refused=(1, 2, 3)), reader, recordings, 10)
    assert found["text_to_token.spans.1_3.generated.wer"] == 1.0
