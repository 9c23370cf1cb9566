"""Word times in any form are the same words; times that cannot be right name the word and the rule."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.word_times import LONGEST_WORD_S, words_of

TEXT = "the red fox sees the small house"
GOOD = [[w, 0.25 * i, 0.25 * i + 0.24] for i, w in enumerate(TEXT.split())]


def fault(words: Any, text: str = TEXT, duration_s: float | None = 2.0, **row: Any) -> tuple[str, str]:
    with pytest.raises(BrokenAudio) as found:
        words_of({"words": words, **row}, text, duration_s)
    return found.value.reason, found.value.detail


def changed(place: int, start: Any, end: Any) -> list[list[Any]]:
    return [[w, start, end] if i == place else [w, a, b] for i, (w, a, b) in enumerate(GOOD)]


FORMS = {
    "triples": GOOD,
    "ours": [{"text": w, "start_s": a, "end_s": b, "score": 1.0} for w, a, b in GOOD],
    "whisperX": [{"word": w, "start": a, "end": b, "score": 0.9} for w, a, b in GOOD],
    "text of numbers": [(w, str(a), str(b)) for w, a, b in GOOD],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_words(form: str) -> None:
    words = words_of({"words": FORMS[form]}, TEXT, 2.0)
    assert [[w.text, w.start_s, w.end_s] for w in words] == GOOD


@pytest.mark.parametrize("nothing", [None, [], float("nan")])
def test_no_words_are_no_fault(nothing: Any) -> None:
    assert words_of({"words": nothing}, TEXT, 2.0) == ()
    assert words_of({}, TEXT, 2.0) == ()


@pytest.mark.parametrize(
    ("words", "reason", "named"),
    [
        (changed(3, 0.75, 0.5), "a word ends before it starts", "word 4 'sees'"),
        (changed(3, math.nan, math.nan), "word times are not numbers", "word 4 'sees'"),
        (changed(3, 0.75, math.inf), "word times are not numbers", "word 4 'sees'"),
        (changed(3, 0.2, 0.99), "its word times are not in order", "word 4 'sees'"),
        (changed(0, -3.0, 0.2), "its word times are not in order", "word 1 'the'"),
        (changed(6, 1.5, 2.6), "word times behind the end of the audio", "word 7 'house'"),
        ([[w, 1000 * a, 1000 * b] for w, a, b in GOOD], "word times behind the end of the audio", "milliseconds"),
        ([["completely", 0.0, 0.5], ["other", 0.5, 1.0]], "words of another text", "'completely'"),
        (GOOD[:2], "words of another text", "'the red'"),
        ("nonsense", "words are not [[word, start_s, end_s], ...]", "nonsense"),
        ([["the", 0.0]], "words are not [[word, start_s, end_s], ...]", "the"),
        ([{"word": "the", "start": 0.0}], "words are not [[word, start_s, end_s], ...]", "the"),
        ([["the", True, 1.0]], "words are not [[word, start_s, end_s], ...]", "the"),
        ([{"word": w} for w, _, _ in GOOD], "word times are not numbers", "no word has times"),
    ],
)
def test_what_cannot_be_right_names_the_word_and_the_rule(words: Any, reason: str, named: str) -> None:
    found = fault(words)
    assert found[0] == reason
    assert named in found[1]


def test_a_long_recording_with_two_words_is_no_alignment() -> None:
    words = [["hello", 0.5, 13.4], ["you", 13.4, 14.0]]
    assert fault(words, "hello you", 51.0)[0] == "a word of more than 5 s"
    sentence = "今天天气很好我们去公园"  # one word, as `align` cuts it
    assert words_of({"words": [[sentence, 0.0, 8.0]]}, sentence, 9.0)[0].end_s == 8.0


def test_words_may_be_spelled_otherwise() -> None:
    said = [
        [w, 0.2 * i, 0.2 * i + 0.2]
        for i, w in enumerate(["in", "nineteen", "forty", "they", "left", "don't", "you", "know"])
    ]
    assert len(words_of({"words": said}, "In 1940, they left; don\u2019t you know?", 2.0)) == 8
    chinese = [["今天", 0.0, 0.5], ["天气", 0.5, 1.0], ["很好", 1.0, 1.5]]
    assert len(words_of({"words": chinese}, "今天天气很好。", 2.0)) == 3
    assert len(words_of({"words": [["okay", 0.0, 0.5]]}, "okey", 2.0)) == 1


@settings(max_examples=100)
@given(missing=st.sets(st.integers(0, 6), max_size=6), duration_s=st.floats(1.74, 2.0))
def test_words_without_times_share_the_gap_of_their_neighbours(missing: set[int], duration_s: float) -> None:
    given_words = [
        {"word": w} if i in missing else {"word": w, "start": a, "end": b} for i, (w, a, b) in enumerate(GOOD)
    ]
    words = words_of({"words": given_words}, TEXT, duration_s)
    assert [w.text for w in words] == TEXT.split()
    for i, word in enumerate(words):
        if i not in missing:
            assert (word.start_s, word.end_s) == tuple(GOOD[i][1:])
        assert word.start_s <= word.end_s
    for a, b in itertools.pairwise(words):
        assert a.end_s <= b.start_s + 1e-9
    assert words[0].start_s == 0.0
    assert words[-1].end_s == pytest.approx(duration_s if 6 in missing else GOOD[6][2])


def test_times_of_a_part_count_from_its_file() -> None:
    words = words_of({"words": [["red", 10.0, 10.4], ["fox", 10.5, 11.0]], "start": 10.0, "end": 11.0}, "red fox", 1.0)
    assert [(w.start_s, w.end_s) for w in words] == [(0.0, pytest.approx(0.4)), (0.5, 1.0)]
    reason, _ = fault([["red", 0.0, 0.4], ["fox", 0.5, 1.0]], "red fox", 1.0, start=10.0, end=11.0)
    assert reason == "its word times are not in order"


@given(seconds=st.floats(0.01, 20))
def test_how_long_a_word_may_be(seconds: float) -> None:
    row = {"words": [["fox", 0.0, seconds]]}
    if seconds <= LONGEST_WORD_S:
        assert words_of(row, "fox", 20.0)
    else:
        assert fault(row["words"], "fox", 20.0)[0] == "a word of more than 5 s"
