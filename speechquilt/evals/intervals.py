"""How sure a score is: every 95 % interval is made here, of accuracies, of paired differences, of losses and error rates.

Trap: items are not independent. Ten questions about one fact are right or wrong together, so the interval is computed
from the number of clusters (facts, stories), not from the number of items.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution

RATE_SUMS = ("spans", "words", "errors", "words_squared", "words_errors", "errors_squared")


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


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """A sum per token with its 95 % interval over `n` segments."""

    value: float
    low: float
    high: float
    n: int


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
        low, high = _bootstrap(delta_C, sizes_C, seed, draws)
    return Difference(value=float(delta_N.mean()), low=low, high=high, n=len(correct_a), clusters=len(names))


def per_token(sum_N: np.ndarray, tokens_N: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> PerToken:
    """Sum of `sum_N` (nats of each segment) per token: percentile bootstrap over whole segments, seeded."""
    low, high = _bootstrap(sum_N, tokens_N, seed, draws)
    return PerToken(value=float(sum_N.sum() / tokens_N.sum()), low=low, high=high, n=len(sum_N))


def rate_sums(spans: Iterable[tuple[int, int]]) -> dict[str, int]:
    """(words, errors) of each span -> the sums that `rate_interval` needs; those of two sets add up."""
    sums = dict.fromkeys(RATE_SUMS, 0)
    for w, e in spans:
        for key, value in zip(RATE_SUMS, (1, w, e, w * w, w * e, e * e)):
            sums[key] += value
    return sums


def rate_interval(sums: Mapping[str, int]) -> tuple[float, float]:
    """95 % score interval of errors per word, with errors as Poisson counts that spread `d` times wider than Poisson.

    `sums`: as of `rate_sums`.

    Errors come in whole spans, so `d` is the variance of the summed errors, estimated between spans as for a ratio, over
    its Poisson value; at least 1, and the mean span length when there is one span or no error to estimate it from. Unlike
    a bootstrap it needs only sums, so shards can be added up, and it is not of width 0 without errors.
    """
    n, w, e = sums["spans"], sums["words"], sums["errors"]
    rate = e / w
    spread = w / n
    if n > 1 and e:
        squares = sums["errors_squared"] - 2 * rate * sums["words_errors"] + rate**2 * sums["words_squared"]
        spread = max(1.0, n / (n - 1) * squares / e)
    centre = rate + Z95**2 * spread / (2 * w)
    half = Z95 * sqrt(spread * rate / w + (Z95**2 * spread / (2 * w)) ** 2)
    return max(0.0, centre - half), centre + half


def _bootstrap(sum_N: np.ndarray, size_N: np.ndarray, seed: int, draws: int) -> tuple[float, float]:
    """Of sum(sum_N) / sum(size_N), where whole things (clusters, segments) are drawn again with replacement."""
    picks_DN = np.random.default_rng(seed).integers(len(sum_N), size=(draws, len(sum_N)))
    low, high = np.quantile(sum_N[picks_DN].sum(1) / size_N[picks_DN].sum(1), [0.025, 0.975])
    return float(low), float(high)


def _cluster_sizes(correct: Sequence[bool], cluster: Sequence[str]) -> np.ndarray:
    """Items per cluster, in the order of the sorted cluster names."""
    if len(correct) != len(cluster):
        raise ValueError(f"{len(correct)} answers for {len(cluster)} cluster names; every item needs its cluster")
    if not len(correct):
        raise ValueError("no items to score: an accuracy needs at least one; check that the task's item list is filled")
    return np.unique(np.asarray(cluster), return_counts=True)[1]
