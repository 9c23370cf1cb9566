"""Where the spans of a document may lie: lengths, and a uniform choice among all placements that avoid forbidden words.

This is arithmetic alone: it knows runs of words and no text.
Trap: "uniform" is over placements, not over words. Long spans fit only into long runs, so a document full of holes is
spoken most where its speakable text is least broken.

Spans keep their order and at least one word lies between two of them. The gap between two runs is such a word, so
runs meet only in how many spans each takes, and counting goes over runs instead of words: with R words and n spans of
t words in all, a run has C(R - t + 1, n) placements.

Axis letters: W words, J runs, K spans (K + 1 ways to have placed some), N spans in one run.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

GROUP_WORDS = 8192  # runs are dealt with in groups of so many words, so that a book costs as much per word as a page


class Run(NamedTuple):
    """Neighbouring words that may all be spoken: [start, start + length)."""

    start: int
    length: int


def draw_lengths(num_words: int, rng: np.random.Generator, poisson_mean: float) -> list[int]:
    """Poisson lengths without zeros that add up to `num_words`, the last one shortened, in random order."""
    lengths: list[int] = []
    missing = num_words
    while missing:
        length = min(int(rng.poisson(poisson_mean)), missing)
        if length:
            lengths.append(length)
            missing -= length
    return [lengths[i] for i in rng.permutation(len(lengths))]


def place_spans(lengths: Sequence[int], gaps: Sequence[int]) -> list[tuple[int, int]]:
    """Spans of these lengths, each put where `gaps[k]` (rising) text words have passed."""
    spans = []
    spoken = 0
    for gap, length in zip(gaps, lengths):
        spans.append((gap + spoken, gap + spoken + length))
        spoken += length
    return spans


def place_anywhere(lengths: Sequence[int], num_words: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans of these lengths, in this order, in `num_words` words that may all be spoken; uniform over placements."""
    gaps = np.sort(rng.choice(num_words - sum(lengths) + 1, size=len(lengths), replace=False))
    return place_spans(lengths, gaps.tolist())


def place_in_runs(
    num_spoken: int, runs: Sequence[Run], rng: np.random.Generator, poisson_mean: float
) -> list[tuple[int, int]]:
    """Spans of `num_spoken` words in all, only inside the runs; each legal placement of the drawn lengths is as likely.

    Lengths that have no placement are cut: none longer than the longest run, then than three quarters of that, and so on.
    Raises ValueError for more than half of the runs' words, where spans could not always be kept apart.
    """
    total = sum(run.length for run in runs)
    if 2 * num_spoken > total:
        raise ValueError(f"num_spoken={num_spoken} must be at most half of the {total} words of the runs")
    spans: list[tuple[int, int]] = []
    passed = 0
    for group in _groups(runs):
        size = sum(run.length for run in group)
        share = num_spoken * (passed + size) // total - num_spoken * passed // total
        lengths = draw_lengths(share, rng, poisson_mean)
        spans += place_in_order(lengths, group, rng)
        passed += size
    return spans


def place_in_order(lengths: Sequence[int], runs: Sequence[Run], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Spans of these lengths, in this order, inside the runs, or cut as `place_in_runs` says."""
    if not lengths:
        return []
    if len(runs) == 1 and sum(lengths) + len(lengths) <= runs[0].length + 1:  # a book without holes needs no table
        return [(runs[0].start + a, runs[0].start + b) for a, b in place_anywhere(lengths, runs[0].length, rng)]
    longest = min(max(lengths), max(run.length for run in runs))
    while longest:
        ways = _Ways(cut(lengths, longest), runs)
        if ways.num_ways_log > -np.inf:
            return ways.draw(rng)
        longest = longest * 3 // 4
    raise ValueError(f"spans of {sum(lengths)} words have no place in runs of {[run.length for run in runs]} words")


def cut(lengths: Sequence[int], longest: int) -> list[int]:
    """The same words in spans of at most `longest`, the rest of each in its last piece: 7 by 3 is 3, 3, 1."""
    return [min(longest, length - done) for length in lengths for done in range(0, length, longest)]


def _groups(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Neighbouring runs, together at most GROUP_WORDS, unless one run alone is longer."""
    group: list[Run] = []
    size = 0
    for run in runs:
        if group and size + run.length > GROUP_WORDS:
            yield group
            group, size = [], 0
        group.append(run)
        size += run.length
    if group:
        yield group


class _Ways:
    """How many ways there are to put spans k, k + 1, ... into the runs j, j + 1, ..., as logarithms."""

    def __init__(self, lengths: Sequence[int], runs: Sequence[Run]) -> None:
        self.lengths = list(lengths)
        # The most spans a run could take: as many as fit when they are the shortest.
        room = np.cumsum(np.sort(lengths)) + np.arange(len(lengths))
        self.runs = [run for run in runs if run.length >= room[0]]
        self._most = [int(np.searchsorted(room, run.length, "right")) for run in self.runs]
        self._log_factorial = np.cumsum(np.log(np.maximum(1, np.arange(2 + max(run.length for run in runs)))))
        self._in_run: dict[int, np.ndarray] = {}
        # Behind the last span there are `most` more columns: no way to have placed spans that do not exist.
        num_spans, most = len(lengths), max(self._most, default=0)
        self._passed_K = np.full(num_spans + 1 + most, np.iinfo(np.int64).max // 2)
        self._passed_K[: num_spans + 1] = np.cumsum([0, *lengths])
        self._after_KN = np.arange(num_spans + 1)[:, None] + np.arange(most + 1)
        self._log_JK = np.full((len(self.runs) + 1, num_spans + 1 + most), -np.inf)
        self._log_JK[-1, num_spans] = 0.0
        for j, run in reversed(list(enumerate(self.runs))):
            rest_KN = self._log_JK[j + 1][self._after_KN[:, : self._most[j] + 1]]
            ways_KN = self._ways_in_run(run.length, self._most[j]) + rest_KN
            self._log_JK[j, : num_spans + 1] = np.logaddexp.reduce(ways_KN, axis=1)

    @property
    def num_ways_log(self) -> float:
        """The logarithm of the number of legal placements, -inf when there is none."""
        return float(self._log_JK[0, 0])

    def draw(self, rng: np.random.Generator) -> list[tuple[int, int]]:
        """One placement, each as likely as any other."""
        spans: list[tuple[int, int]] = []
        first = 0
        for j, run in enumerate(self.runs):
            most = self._most[j]
            log_N = self._ways_in_run(run.length, most)[first] + self._log_JK[j + 1, first : first + most + 1]
            cumulated_N = np.cumsum(np.exp(log_N - log_N.max()))
            num = int(np.searchsorted(cumulated_N, rng.random() * cumulated_N[-1], "right"))
            placed = place_anywhere(self.lengths[first : first + num], run.length, rng)
            spans += [(run.start + start, run.start + end) for start, end in placed]
            first += num
        return spans

    def _ways_in_run(self, length: int, most: int) -> np.ndarray:
        """`[K + 1, N + 1]`: log C(length - t + 1, n), where the spans k, ..., k + n - 1 have t words; -inf if too long."""
        if length not in self._in_run:
            n_N = np.arange(most + 1)
            passed_KN = self._passed_K[self._after_KN[:, : most + 1]]
            slots_KN = length + 1 - (passed_KN - passed_KN[:, :1])
            free_KN = np.maximum(slots_KN - n_N, 0)
            log_f = self._log_factorial
            log_KN = log_f[np.maximum(slots_KN, 0)] - log_f[n_N] - log_f[free_KN]
            self._in_run[length] = np.where(slots_KN >= n_N, log_KN, -np.inf)
        return self._in_run[length]
