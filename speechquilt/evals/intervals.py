"""How sure a score is: accuracy with a 95 % interval, and the paired difference of two systems.

Trap: items are not independent. Ten questions about one fact are right or wrong together, so the interval is computed
from the number of clusters (facts, stories), not from the number of items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of right answers, with its 95 % interval."""

    value: float
    """The share, 0 to 1."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Items."""
    clusters: int
    """Distinct things that the items are about."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of system a minus accuracy of system b on the same items, with its 95 % interval."""

    value: float
    """The difference, -1 to 1; above 0 when a is better."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Items."""
    clusters: int
    """Distinct things that the items are about."""


def wilson(value: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share seen in `n` independent trials. Unlike value +- 2 sd it never leaves
    [0, 1] and is not of width 0 at 0 % or 100 %."""
    centre = (value + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * sqrt(value * (1 - value) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return max(0.0, min(centre - half, value)), min(1.0, max(centre + half, value))


def accuracy(correct: Sequence[bool], cluster: Sequence[str]) -> Accuracy:
    """Share of `correct` with a Wilson interval over the effective number of independent items.

    Items of one cluster are taken as fully dependent, the worst case: k clusters of equal size count as k trials, and
    clusters of sizes m_i as (sum m)^2 / sum m^2 trials (Kish), which is never more than the number of clusters. The
    interval is therefore too wide rather than too narrow. Raises ValueError on no items or lists of unequal length.
    """
    sizes = _cluster_sizes(correct, cluster)
    value = float(np.mean([bool(c) for c in correct]))
    low, high = wilson(value, float(sizes.sum() ** 2 / (sizes**2).sum()))
    return Accuracy(value=value, low=low, high=high, n=len(correct), clusters=len(sizes))


def above_chance(measured: Accuracy, chance: float) -> bool:
    """Whether the whole interval lies above chance."""
    return measured.low > chance


def paired_difference(
    correct_a: Sequence[bool], correct_b: Sequence[bool], cluster: Sequence[str], *, seed: int = 0, draws: int = 10_000
) -> Difference:
    """Accuracy of a minus accuracy of b on the same items: percentile bootstrap over whole clusters, seeded.

    Two systems share the hard items, so the interval of the difference is narrower than two separate intervals
    suggest. Trap: with fewer than about 20 clusters a percentile bootstrap is a little too narrow; with one cluster
    nothing can be said and the interval is [-1, 1]. Raises ValueError on no items or lists of unequal length.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(
            f"{len(correct_a)} answers of a against {len(correct_b)} of b; both must answer the same items"
        )
    sizes_C = _cluster_sizes(correct_a, cluster)
    names, index_N = np.unique(np.asarray(cluster), return_inverse=True)
    delta_N = np.asarray(correct_a, dtype=float) - np.asarray(correct_b, dtype=float)
    delta_C = np.bincount(index_N, weights=delta_N, minlength=len(names))
    low, high = -1.0, 1.0
    if len(names) > 1:
        picks_RC = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        means_R = delta_C[picks_RC].sum(1) / sizes_C[picks_RC].sum(1)
        low, high = (float(q) for q in np.quantile(means_R, [0.025, 0.975]))
    return Difference(value=float(delta_N.mean()), low=low, high=high, n=len(correct_a), clusters=len(names))


def _cluster_sizes(correct: Sequence[bool], cluster: Sequence[str]) -> np.ndarray:
    """Items per cluster, in the order of the sorted cluster names."""
    if len(correct) != len(cluster):
        raise ValueError(f"{len(correct)} answers for {len(cluster)} cluster names; every item needs its cluster")
    if not len(correct):
        raise ValueError("no items to score: an accuracy needs at least one; check that the task's item list is filled")
    return np.unique(np.asarray(cluster), return_counts=True)[1]
