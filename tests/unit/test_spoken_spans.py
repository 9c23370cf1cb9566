"""Spans by length: the recorded tokens of a span are its own, and a text-to-token model that has learned them reads as they do."""

import numpy as np
import pytest

from speechquilt.evals.results import Schema
from speechquilt.stages.spoken_spans import MEASURES, WORDS, cut, draw_spans, measure_spans
from speechquilt.types import AlignedTokens, SpokenSpan

NAMES = ["the", "old", "man", "who", "sold", "us", "apples", "went", "home", "before", "noon", "today"]
SILENCE_ID = 23


def recording() -> AlignedTokens:
    """Silence, then a token for each word, which is its number, with a silence behind every second."""
    word_T = [-1]
    for word in range(len(NAMES)):
        word_T += [word] + [-1] * (word % 2)
    ids_T = np.array([SILENCE_ID if word < 0 else word for word in word_T], dtype=np.int32)
    return AlignedTokens(id="r", text=" ".join(NAMES), words=tuple(NAMES), ids_T=ids_T, word_T=np.array(word_T))


class Speller:
    """Reads exactly what the tokens of `recording` say."""

    def read_back(self, tokens):
        return [" ".join(NAMES[i] for i in ids_T.tolist() if i != SILENCE_ID) for ids_T in tokens]


def test_a_span_is_its_words_and_the_silence_between_them():
    span = cut(recording(), 1, 2)
    assert (span.text, span.ids_T.tolist()) == ("old man", [1, SILENCE_ID, 2])
    assert cut(recording(), 0, 1).ids_T.tolist() == [0]


def test_spans_have_the_lengths_of_their_class_and_come_again():
    recordings = [recording()] * 3
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
    """An engine that knows the recording by heart, but says a word too many, and refuses spans of some lengths."""

    frame_rate = 12.5

    def __init__(self, refused=()):
        self.refused = refused

    def generate(self, texts, seeds):
        return [self._say(text) for text in texts]

    def _say(self, text):
        first, length = NAMES.index(text.split()[0]), len(text.split())
        ids_T = np.append(cut(recording(), first, length).ids_T, 0)
        return SpokenSpan(ids_T=ids_T, unit_end_T=np.zeros(len(ids_T)), reject="loop" if length in self.refused else "")


def test_every_length_has_the_rate_of_both():
    found = measure_spans(Replay(), Speller(), [recording()], 10)
    Schema(MEASURES).check(found)
    for length in WORDS:
        generated, recorded = (f"text_to_token.spans.{length}.{by}" for by in ("generated", "recorded"))
        assert found[f"{recorded}.wer"] == 0
        assert found[f"{generated}.n"] == found[f"{recorded}.n"] == (1 if length == "sentence" else 10)
        assert found[f"{generated}.wer"] == pytest.approx(found[f"{generated}.n"] / found[f"{generated}.words"])
    verdicts = {v.name: (v.target, v.met) for v in Schema(MEASURES).verdicts(found)}
    assert verdicts["Text-to-token, 10 words and more: word error rate"] == ("≤ 15 %", True)
    assert verdicts["Text-to-token, 1-3 words: word error rate"] == ("≤ 15 %", False)


def test_a_refused_span_is_all_of_its_words():
    found = measure_spans(Replay(refused=(1, 2, 3)), Speller(), [recording()], 10)
    assert found["text_to_token.spans.1_3.generated.wer"] == 1
    assert found["text_to_token.spans.1_3.recorded.wer"] == 0
