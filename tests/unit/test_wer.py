"""Word and character error rates: known cases and properties of an edit distance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.evals.wer import EditErrors, cer, character_errors, wer, word_errors

sentences = st.lists(st.sampled_from(["a", "b", "c", "dog"]), max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("the cat sat", "the cat sat", (0, 0, 0)),
        ("The cat, sat!", "the CAT sat", (0, 0, 0)),
        ("the cat sat", "the dog sat", (1, 0, 0)),
        ("the cat sat", "the sat", (0, 0, 1)),
        ("the cat sat", "the big cat sat", (0, 1, 0)),
        ("the cat sat", "", (0, 0, 3)),
        ("", "the cat", (0, 2, 0)),
        ("a b c d", "b c d e", (0, 1, 1)),
        ("", "", (0, 0, 0)),
    ],
)
def test_known_cases(reference, hypothesis, counts):
    errors = word_errors(reference, hypothesis)
    assert (errors.substitutions, errors.insertions, errors.deletions) == counts
    assert errors.length == len(reference.split())


@settings(max_examples=60, deadline=None)
@given(sentences, sentences)
def test_edit_distance_is_symmetric_and_bounded(a, b):
    forward, backward = word_errors(a, b), word_errors(b, a)
    assert forward.errors == backward.errors
    assert (forward.errors == 0) == (a == b)
    n, m = len(a.split()), len(b.split())
    assert abs(n - m) <= forward.errors <= max(n, m)
    assert forward.insertions - forward.deletions == m - n


@settings(max_examples=40, deadline=None)
@given(sentences, sentences, sentences)
def test_triangle(a, b, c):
    assert word_errors(a, c).errors <= word_errors(a, b).errors + word_errors(b, c).errors


def test_rate_of_a_set_is_over_all_words():
    """One error in 1 word and none in 9 is 10 %, not the mean of 100 % and 0 %."""
    assert wer([("no", "yes"), ("a b c d e f g h i", "a b c d e f g h i")]).rate == pytest.approx(0.1)
    assert wer([("a", "a b c")]).rate == 2.0


def test_no_reference_words():
    assert wer([]) == EditErrors()
    with pytest.raises(ValueError, match="reference"):
        _ = wer([("", "a")]).rate


@settings(max_examples=40, deadline=None)
@given(st.text("ab ", max_size=9), st.text("ab ", max_size=9))
def test_characters_are_words_of_one_letter(a, b):
    def spaced(text):
        return " ".join(text.replace(" ", ""))

    assert character_errors(a, b) == word_errors(spaced(a), spaced(b))


def test_character_errors_ignore_spaces_and_know_chinese():
    assert cer([("今天天气很好", "今天 天汽很好。")]).rate == pytest.approx(1 / 6)
    assert cer([("to gether", "together")]).rate == 0
    assert wer([("今天天气很好", "今天天汽很好")]).rate == 1.0
