"""Synthetic interleaving: the algorithm of spec 1, 5.2, step by step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.interleaving.placement import place_spans
from speechquilt.data.interleaving.speakable import unspeakable_words
from speechquilt.data.interleaving.synthetic import (
    InterleaveConfig,
    InterleaveStats,
    assemble,
    choose_spans,
    plan,
    split_words,
)
from speechquilt.types import SpokenSpan

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
WORDS_60 = " ".join(f"w{ALPHABET[i % 26]}{ALPHABET[i // 26]}" for i in range(60))
WORDS_40, WORDS_20 = " ".join(WORDS_60.split()[:40]), " ".join(WORDS_60.split()[:20])


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def say(num_tokens: int, reject: str = "") -> SpokenSpan:
    ends = np.zeros(num_tokens, dtype=bool)
    ends[-1:] = True
    return SpokenSpan(ids_T=np.arange(num_tokens), unit_end_T=ends, reject=reject)


def test_worked_example_of_the_specification():
    assert place_spans([4, 2], [5, 12]) == [(5, 9), (16, 18)]


@settings(max_examples=150, deadline=None)
@given(
    num_words=st.integers(0, 300),
    seed=st.integers(0, 2**32),
    ratio=st.floats(0, 0.5),
    mean=st.floats(1, 20),
)
def test_spans_cover_the_ratio_exactly_and_never_touch(num_words, seed, ratio, mean):
    spans = choose_spans(num_words, np.random.default_rng(seed), ratio, mean)
    assert sum(end - start for start, end in spans) == int(ratio * num_words + 0.5)
    assert all(0 <= start < end <= num_words for start, end in spans)
    assert all(next_start > end for (_, end), (next_start, _) in pairwise(spans))


def test_every_word_is_equally_likely_up_to_the_ends():
    """All placements are equally likely, so the middle of a document is covered at the ratio and the pattern is
    symmetric. (The very ends are covered a little less: a span that could start before word 0 does not exist.)"""
    num_words, draws = 60, 6000
    rng = np.random.default_rng(0)
    covered = np.zeros(num_words)
    for _ in range(draws):
        for start, end in choose_spans(num_words, rng, 0.3, 6):
            covered[start:end] += 1
    covered /= draws
    assert abs(covered.mean() - 0.3) < 1e-9
    deviation = np.sqrt(0.3 * 0.7 / draws)
    assert np.abs(covered - covered[::-1]).max() < 5 * np.sqrt(2) * deviation
    assert np.abs(covered[8:-8] - covered[8:-8].mean()).max() < 6 * deviation


def test_all_placements_are_equally_likely():
    """7 words, spans of 1 and 1 word with 5 text words: 6 gaps, 15 pairs of gaps, each as likely as the others."""
    rng = np.random.default_rng(1)
    drawn = (tuple(choose_spans(7, rng, 2 / 7, 1)) for _ in range(6000))
    counts = Counter(spans for spans in drawn if len(spans) == 2)
    assert len(counts) == 15
    expected = sum(counts.values()) / 15
    assert min(counts.values()) > expected - 5 * np.sqrt(expected)
    assert max(counts.values()) < expected + 5 * np.sqrt(expected)


def test_lengths_are_poisson():
    rng = np.random.default_rng(2)
    lengths = [end - start for _ in range(300) for start, end in choose_spans(2000, rng, 0.3, 10)]
    assert 9.5 < np.mean(lengths) < 10.2  # the last of about 60 is shortened
    assert 9 < np.var(lengths) < 12


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=" \t\n\u3000\u00a0ab,.'世界。カﾟé🙂", max_size=60))
def test_words_join_to_the_text(text):
    words = split_words(text)
    assert "".join(words) == (text if text.strip() else "")
    assert all(word.strip() for word in words)


def test_words_of_scripts_with_and_without_spaces():
    assert split_words("  Hello, big\nworld. ") == ["  Hello,", " big", "\nworld. "]
    assert split_words("你好，世界。ok") == ["你", "好，", "世", "界。", "ok"]
    assert split_words(" \n ") == []


def test_white_space_at_the_end_is_walked_over_once():
    """Tried from every place in it, this much would take hours."""
    space = " \n" * 300_000
    assert split_words(f"one two{space}") == ["one", f" two{space}"]
    assert split_words(space) == []


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", "bb", "世", "é.", " ", "\n\n", "\t"]), max_size=80).map("".join),
    id=st.text(max_size=5),
    pass_index=st.integers(0, 3),
    ratio=st.floats(0, 0.5),
)
def test_pieces_join_to_the_document(text, id, pass_index, ratio):
    result = plan(id, text, pass_index, InterleaveConfig(ratio=ratio, poisson_mean=2, character_mean=3, min_words=4))
    assert "".join(piece.text for piece in result.pieces) == text
    for before, after in pairwise(result.pieces):
        assert before.modality != after.modality
    for k, piece in enumerate(result.pieces):
        if piece.modality == "speech":  # white space is the text's, wherever there is a text to hold it
            assert k == 0 or piece.text == piece.text.lstrip()
            assert k == len(result.pieces) - 1 or piece.text == piece.text.rstrip()
    assert all(span and span == span.strip() for span in result.spans)


MIXED = [
    "a",
    "word",
    "Dr.",
    "5",
    "kg",
    "max_len",
    "https://a.org",
    "|",
    "=",
    "$x$",
    "`b`",
    "世",
    "λ",
    "—",
    "\n",
    "\n\n    ",
    "\n```\n",
]


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(MIXED), max_size=120).map(" ".join),
    ratio=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_only_what_can_be_spoken_is_chosen(text, ratio, seed):
    config = InterleaveConfig(ratio=ratio, poisson_mean=3, character_mean=3, min_words=1, seed=seed)
    result = plan("d", text, 0, config)
    assert "".join(piece.text for piece in result.pieces) == text
    reasons = unspeakable_words(split_words(text))
    assert result.unspeakable == Counter(reason for reason in reasons if reason)
    spoken, word = 0, 0
    for piece in result.pieces:
        num_words = len(split_words(piece.text))
        if piece.modality == "speech":
            assert not any(reasons[word : word + num_words])
            spoken += num_words
        word += num_words
    target = int(ratio * len(reasons) + 0.5)
    assert spoken == (min(target, reasons.count("") // 2) if any(reasons) else target)


def test_a_corpus_is_spoken_at_the_ratio_of_all_its_words():
    """2,000 documents in which up to a third cannot be spoken: the words that can make up for the others."""
    rng = np.random.default_rng(5)
    words, spoken, speakable = 0, 0, 0
    for i in range(2000):
        holes = rng.random() / 3
        text = " ".join("x_y" if rng.random() < holes else "word" for _ in range(int(rng.integers(20, 120))))
        result = plan(str(i), text, 0, InterleaveConfig())
        words += len(split_words(text))
        speakable += len(split_words(text)) - result.unspeakable.total()
        spoken += sum(len(span.split()) for span in result.spans)
    assert speakable < 0.9 * words
    assert abs(spoken / words / 0.3 - 1) < 0.01


def test_spans_are_spoken_in_words_and_stay_written_in_the_text():
    text = "It was on 2024-01-15 that Dr. Lee paid $5 for 3 kg of it. " * 5
    result = plan("d", text, 0, InterleaveConfig(poisson_mean=4))
    assert "".join(piece.text for piece in result.pieces) == text
    assert any("5" in span for span in result.spans)
    assert not any(sign.isdigit() for span in result.spoken_spans for sign in span)
    assert plan("d", WORDS_60, 0, InterleaveConfig()).spoken_spans == plan("d", WORDS_60, 0, InterleaveConfig()).spans


def test_a_span_is_judged_by_the_words_that_were_spoken():
    result = plan("d", "1999 " * 20, 0, InterleaveConfig(poisson_mean=100))
    (written,), (spoken,) = result.spans, result.spoken_spans
    assert len(encode(written)) == 6
    assert len(encode(spoken)) >= 18  # nineteen ninety nine, nineteen ninety nine, ...
    good = InterleaveStats()
    assemble(result, [say(4 * len(encode(spoken)))], encode, stats=good)
    assert not good.rejects  # more than 9 for each written word
    bad = InterleaveStats()
    assemble(result, [say(len(encode(spoken)) - 1)], encode, stats=bad)
    assert bad.rejects == Counter({"fewer than 1 speech tokens per text token": 1})


def test_what_was_never_chosen_is_counted():
    text = " ".join(["word"] * 30 + ["x_y"] * 9 + ["https://a.org"])
    result = plan("d", text, 0, InterleaveConfig(poisson_mean=100))
    stats = InterleaveStats()
    for _ in range(2):
        assemble(result, [say(3 * len(span.split())) for span in result.spans], encode, stats=stats)
    assert stats.unspeakable == Counter({"code": 18, "url": 2})
    assert (stats.words, stats.spoken_words) == (80, 24)
    assert stats.ratio == 0.3
    assert stats.speakable_ratio == 0.4


def test_a_plan_depends_on_document_pass_and_seed_alone():
    config = InterleaveConfig()
    first = plan("d", WORDS_60, 0, config)
    assert first == plan("d", WORDS_60, 0, config)
    others = [
        plan("d", WORDS_60, 1, config),
        plan("e", WORDS_60, 0, config),
        plan("d", WORDS_60, 0, InterleaveConfig(seed=1)),
    ]
    assert len({str(p.pieces) for p in [first, *others]}) == 4
    # written down once: a change here changes every interleaved data set ever made
    assert first.seed == 161991038498215
    assert [len(split_words(p.text)) for p in first.pieces] == [7, 7, 2, 5, 33, 6]


def test_short_documents_stay_text():
    text = " ".join(["w"] * 19)
    assert [p.modality for p in plan("d", text, 0, InterleaveConfig()).pieces] == ["text"]
    assert plan("d", "", 0, InterleaveConfig()).pieces == ()
    assert assemble(plan("d", " ", 0, InterleaveConfig()), [], encode).segments == ()


def test_scripts_without_spaces_get_longer_spans():
    text = "世" * 3000
    config = InterleaveConfig()
    lengths = [len(span) for i in range(5) for span in plan(str(i), text, 0, config).spans]
    assert 14.5 < np.mean(lengths) < 17


def test_assembled_document_has_every_piece_in_place():
    result = plan("d", WORDS_20, 0, InterleaveConfig(poisson_mean=3))
    spoken = [say(3 * len(span.split()) + 1) for span in result.spans]
    document = assemble(result, spoken, encode, source="mine")
    assert document.id == "d/pass0"
    assert document.source == "mine"
    assert len(document.segments) == len(result.pieces)
    left = iter(spoken)
    for piece, segment in zip(result.pieces, document.segments):
        assert piece.modality == segment.modality
        assert segment.ids_T.dtype == np.int32
        assert segment.loss
        if piece.modality == "text":
            assert segment.ids_T.tolist() == encode(piece.text.strip())
            assert segment.unit_end_T is None
        else:
            span = next(left)
            np.testing.assert_array_equal(segment.ids_T, span.ids_T)
            np.testing.assert_array_equal(segment.unit_end_T, span.unit_end_T)


@pytest.mark.parametrize(
    ("per_word", "reject", "reason"),
    [
        (0.5, "", "fewer than 1 speech tokens per text token"),
        (1, "", ""),
        (9, "", ""),
        (9.5, "", "more than 9 speech tokens per text token"),
        (4, "hit the cap", "hit the cap"),
        (0, "", "no speech tokens"),
    ],
)
def test_bad_spans_stay_text_and_are_counted(per_word, reject, reason):
    result = plan("d", WORDS_40, 0, InterleaveConfig(poisson_mean=100))
    (span,) = result.spans
    assert len(span.split()) == 12
    stats = InterleaveStats()
    document = assemble(result, [say(int(12 * per_word), reject)], encode, stats=stats)
    assert dict(stats.rejects) == ({reason: 1} if reason else {})
    assert (stats.words, stats.spans) == (40, 1)
    if reason:
        (segment,) = document.segments  # joined with the text around it
        assert segment.modality == "text"
        assert segment.ids_T.tolist() == encode(WORDS_40)
        assert stats.ratio == 0
    else:
        assert stats.ratio == 0.3


@pytest.mark.parametrize("per_word", [0.5, 1, 4, 9, 9.5])
@pytest.mark.parametrize("times", [2, 4, 0.5])
def test_a_span_is_judged_as_its_twin_at_another_frame_rate(per_word, times):
    """The same sound at 25, 50 or 6.25 tokens per second."""
    result = plan("d", WORDS_40, 0, InterleaveConfig(poisson_mean=100))
    twins = InterleaveStats(), InterleaveStats()
    assemble(result, [say(int(12 * per_word))], encode, stats=twins[0])
    assemble(result, [say(int(12 * per_word * times))], encode, frame_rate=12.5 * times, stats=twins[1])
    assert twins[0].rejects.total() == twins[1].rejects.total() == (per_word in (0.5, 9.5))
    assert twins[0].ratio == twins[1].ratio


def test_a_span_of_two_text_tokens_is_not_judged_by_its_rate():
    result = plan("d", WORDS_20, 0, InterleaveConfig(ratio=0.1, poisson_mean=100))
    assert len(result.spans[0].split()) == 2
    assert len(assemble(result, [say(1)], encode).segments) == len(result.pieces)
    assert len(assemble(result, [say(50)], encode).segments) == len(result.pieces)


def test_a_missing_span_is_an_error():
    result = plan("d", WORDS_20, 0, InterleaveConfig())
    with pytest.raises(ValueError, match="d: 0 spoken spans for"):
        assemble(result, [], encode)


@pytest.mark.parametrize(
    "wrong", [{"ratio": 0.6}, {"ratio": -0.1}, {"poisson_mean": 0.5}, {"min_words": 0}, {"languages": ()}]
)
def test_config_is_checked(wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=f"{key}="):
        InterleaveConfig(**wrong)
