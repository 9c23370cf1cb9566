"""Spans around words that cannot be spoken: legal, exact, and each placement as likely as the others."""

from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.interleaving import placement
from speechquilt.data.interleaving.placement import cut, place_in_order, place_in_runs
from speechquilt.data.interleaving.synthetic import choose_spans, choose_speakable_spans, runs_of

Spans = tuple[tuple[int, int], ...]


def enumerate_placements(lengths: list[int], speakable_W: np.ndarray) -> list[Spans]:
    """Every legal placement of the spans in this order, by trying all starts."""
    found = []
    for starts in combinations(range(len(speakable_W)), len(lengths)):
        spans = tuple((start, start + length) for start, length in zip(starts, lengths))
        apart = all(b > a for (_, a), (b, _) in pairwise(spans))
        inside = all(end <= len(speakable_W) and speakable_W[start:end].all() for start, end in spans)
        if apart and inside:
            found.append(spans)
    return found


def mask(pattern: str) -> np.ndarray:
    """ "..x." -> bool per word; x cannot be spoken."""
    return np.array([sign == "." for sign in pattern])


@pytest.mark.parametrize(
    ("pattern", "lengths"),
    [
        ("..x....x..", [2, 1]),
        ("...x.x....", [1, 1, 2]),
        (".x.x.x.x..", [1, 1]),
        ("x....x....x", [3, 1]),
        ("........x", [2, 2]),
        ("..x..x..x..", [2, 1, 2]),
    ],
)
def test_every_legal_placement_is_as_likely_as_the_others(pattern, lengths):
    legal = enumerate_placements(lengths, mask(pattern))
    runs, rng, draws = runs_of(mask(pattern)), np.random.default_rng(0), 200 * len(legal)
    counts = Counter(tuple(place_in_order(lengths, runs, rng)) for _ in range(draws))
    assert set(counts) == set(legal)
    chi2 = sum((counts[spans] - 200) ** 2 / 200 for spans in legal)
    freedom = len(legal) - 1
    assert chi2 < freedom + 4.5 * np.sqrt(2 * freedom) + 5  # one in some 10^5 by chance


@settings(max_examples=150, deadline=None)
@given(
    pattern=st.lists(st.sampled_from("....x"), max_size=150).map("".join),
    seed=st.integers(0, 2**32),
    ratio=st.floats(0, 0.5),
    mean=st.floats(1, 20),
    group_words=st.sampled_from([4, 40, 8192]),
)
def test_spans_are_legal_and_reach_the_target(pattern, seed, ratio, mean, group_words):
    speakable_W = mask(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "GROUP_WORDS", group_words)
        spans = choose_speakable_spans(speakable_W, np.random.default_rng(seed), ratio, mean)
    target = int(ratio * len(pattern) + 0.5)
    if not speakable_W.all():
        target = min(target, int(speakable_W.sum()) // 2)
    assert sum(end - start for start, end in spans) == target
    assert all(start < end and speakable_W[start:end].all() for start, end in spans)
    assert all(next_start > end for (_, end), (next_start, _) in pairwise(spans))


@settings(max_examples=100, deadline=None)
@given(num_words=st.integers(0, 300), seed=st.integers(0, 2**32), ratio=st.floats(0, 0.5), mean=st.floats(1, 20))
def test_without_holes_the_draw_is_the_papers(num_words, seed, ratio, mean):
    everything = np.ones(num_words, dtype=bool)
    spans = choose_speakable_spans(everything, np.random.default_rng(seed), ratio, mean)
    assert spans == choose_spans(num_words, np.random.default_rng(seed), ratio, mean)


def test_lengths_keep_their_order_and_their_size_where_they_fit():
    runs = runs_of(mask("." * 40 + "x" + "." * 30 + "x" + "." * 50))
    lengths = [7, 3, 12, 9]
    for seed in range(20):
        spans = place_in_order(lengths, runs, np.random.default_rng(seed))
        assert [end - start for start, end in spans] == lengths


def test_lengths_without_a_place_are_cut_shorter_and_shorter():
    assert cut([7, 2, 4], 3) == [3, 3, 1, 2, 3, 1]
    spans = place_in_order([5], runs_of(mask("...x...")), np.random.default_rng(0))  # 5 into runs of 3
    assert spans == [(0, 3), (4, 6)] or spans == [(0, 3), (5, 7)]
    # both fit alone, but not together: spans of at most 4, or 3, do not help
    spans = place_in_order([6, 5], runs_of(mask("..........x..x..x..x..x..x..")), np.random.default_rng(0))
    assert [end - start for start, end in spans] == [2, 2, 2, 2, 2, 1]


def test_more_than_half_of_the_words_is_an_error():
    with pytest.raises(ValueError, match="num_spoken=3 must be at most half of the 5 words"):
        place_in_runs(3, runs_of(mask("..x...")), np.random.default_rng(0), 2)
    assert place_in_runs(0, [], np.random.default_rng(0), 2) == []


def test_where_the_holes_are_symmetric_so_is_the_speech():
    """Position is unbiased: over many draws the words of a document and of its mirror image are spoken as often."""
    pattern = "." * 12 + "x" + "." * 20 + "xx" + "." * 20 + "x" + "." * 12
    rng, draws = np.random.default_rng(0), 3000
    covered = np.zeros(len(pattern))
    for _ in range(draws):
        for start, end in choose_speakable_spans(mask(pattern), rng, 0.3, 5):
            covered[start:end] += 1
    covered /= draws
    assert abs(covered.sum() - int(0.3 * len(pattern) + 0.5)) < 1e-9
    assert np.abs(covered - covered[::-1]).max() < 5 * np.sqrt(2 * 0.3 * 0.7 / draws)


def test_a_book_with_many_holes_is_placed_without_overflow():
    rng = np.random.default_rng(0)
    speakable_W = rng.random(60_000) > 0.02
    spans = choose_speakable_spans(speakable_W, rng, 0.3, 10)
    assert sum(end - start for start, end in spans) == 18_000
    assert all(speakable_W[start:end].all() for start, end in spans)
    starts = np.array([start for start, _ in spans])
    quarters = np.histogram(starts, bins=4, range=(0, 60_000))[0]
    assert quarters.max() < 1.15 * quarters.min()
    speakable_W = np.ones(400_000, dtype=bool)
    speakable_W[7] = False  # a table over all spans of the long run would not fit into memory
    assert sum(end - start for start, end in choose_speakable_spans(speakable_W, rng, 0.3, 10)) == 120_000
