"""Intervals: known values, the effect of clusters, and the bootstrap's coverage of a real difference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.evals.intervals import above_chance, accuracy, paired_difference, wilson


def test_wilson_known_values():
    """Textbook: 8 of 10 gives 0.490 .. 0.943; 0 of 10 gives 0 .. 0.278."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcdef")), min_size=1, max_size=40))
def test_interval_holds_its_value_and_clusters_only_widen_it(items):
    correct, cluster = [c for c, _ in items], [k for _, k in items]
    clustered = accuracy(correct, cluster)
    independent = accuracy(correct, [str(i) for i in range(len(items))])
    assert 0 <= clustered.low <= clustered.value <= clustered.high <= 1
    assert clustered.value == independent.value
    assert clustered.high - clustered.low >= independent.high - independent.low - 1e-9
    assert (clustered.n, clustered.clusters) == (len(items), len(set(cluster)))


def test_repeating_every_item_does_not_make_it_surer():
    once = accuracy([True, True, False, True], list("abcd"))
    ten_times = accuracy([True, True, False, True] * 10, list("abcd") * 10)
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))
    assert ten_times.n == 40


def test_one_large_cluster_counts_as_about_one():
    """40 questions on one fact and 3 on others say little more than one question."""
    measured = accuracy([True] * 43, ["a"] * 40 + ["b", "c", "d"])
    assert measured.clusters == 4
    assert measured.low == pytest.approx(wilson(1.0, 43**2 / (40**2 + 3))[0])


def test_above_chance_needs_the_whole_interval():
    assert above_chance(accuracy([True] * 18 + [False] * 2, [str(i) for i in range(20)]), 0.5)
    assert not above_chance(accuracy([True] * 12 + [False] * 8, [str(i) for i in range(20)]), 0.5)


@pytest.mark.parametrize(
    "call", [lambda: accuracy([], []), lambda: accuracy([True], []), lambda: accuracy([True], "ab")]
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="item"):
        call()


def test_paired_difference_is_seeded_and_antisymmetric():
    generator = np.random.default_rng(0)
    cluster = [str(i // 4) for i in range(120)]
    a, b = generator.random(120) < 0.8, generator.random(120) < 0.5
    forward = paired_difference(a, b, cluster, seed=3)
    assert forward == paired_difference(a, b, cluster, seed=3)
    backward = paired_difference(b, a, cluster, seed=3)
    assert (backward.value, backward.low, backward.high) == pytest.approx((-forward.value, -forward.high, -forward.low))
    assert forward.low <= forward.value <= forward.high
    assert forward.low > 0


def test_paired_difference_covers_the_truth_nine_times_in_ten():
    """Facts fully dependent inside: an interval over items instead of clusters covers far less than 90 %."""
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        a, b = generator.random(30) < 0.7, generator.random(30) < 0.4
        cluster = [str(i // 6) for i in range(180)]
        result = paired_difference(np.repeat(a, 6), np.repeat(b, 6), cluster, seed=trial, draws=500)
        covered += result.low <= 0.3 <= result.high
    assert covered >= 88


def test_every_draw_is_divided_by_its_own_number_of_items():
    """Always right against always wrong is a difference of 1 whatever clusters are drawn, however unequal."""
    result = paired_difference([True] * 13, [False] * 13, ["a"] * 10 + ["b", "c", "d"])
    assert (result.value, result.low, result.high) == (1.0, 1.0, 1.0)


def test_paired_difference_of_one_cluster_says_nothing():
    result = paired_difference([True, True], [False, False], ["a", "a"])
    assert (result.value, result.low, result.high) == (1.0, -1.0, 1.0)


def test_paired_difference_needs_the_same_items():
    with pytest.raises(ValueError, match="same items"):
        paired_difference([True], [True, False], ["a"])
