"""Which recordings form which batch: buckets of like length, bounded by duration, drawn from corpora at a ratio.

Lengths go in and row numbers come out; no audio is touched here.
Trap: an epoch is a pure function of (lengths, ratio, seed, epoch). Nothing may be remembered from one epoch to the
next, or a run that is resumed in a late epoch would have to live through all earlier ones.
"""

import math
from collections.abc import Sequence

import numpy as np

LENGTH_JITTER = 0.1  # lengths are sorted with this much noise, so that batches differ between epochs


def epoch_rows(num_rows: Sequence[int], ratio: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Row numbers of one epoch, ascending; rows of source s follow those of the sources before it.

    An epoch holds `ratio[s]` rows of source s for every `sum(ratio)`, exactly, and as many rows of every source as it has or
    more. A source that is small for its share comes again, in a new order each time, and over the epochs shows no row twice
    before it has shown all; one epoch by itself may lack some. A single source comes exactly once.
    """
    ratio = [r // math.gcd(*ratio) for r in ratio]
    rounds = max(-(-n // r) for n, r in zip(num_rows, ratio))
    first = np.cumsum([0, *num_rows])
    parts = [
        first[s] + _stream(n, rounds * r * epoch, rounds * r, seed, s) for s, (n, r) in enumerate(zip(num_rows, ratio))
    ]
    return np.sort(np.concatenate(parts))


def bucket(rows_N: np.ndarray, length_N: np.ndarray, limit: float, draw: np.random.Generator) -> list[np.ndarray]:
    """Batches from short to long: rows of like length, at most `limit` samples each with the padding."""
    noisy_N = length_N[rows_N] * (1 + LENGTH_JITTER * draw.standard_normal(len(rows_N)))
    batches: list[list[int]] = [[]]
    longest = 0
    for row in rows_N[np.argsort(noisy_N, kind="stable")].tolist():
        longest = max(longest, int(length_N[row]))
        if batches[-1] and longest * (len(batches[-1]) + 1) > limit:
            batches.append([])
            longest = int(length_N[row])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]


def _stream(num_rows: int, start: int, count: int, seed: int, source: int) -> np.ndarray:
    """Rows number start .. start + count - 1 of the endless stream that shows all rows, in a new order each time."""
    parts = []
    for turn in range(start // num_rows, -(-(start + count) // num_rows)):
        order = np.random.default_rng([seed, source, turn, 2]).permutation(num_rows)
        begin = turn * num_rows
        parts.append(order[max(0, start - begin) : max(0, start + count - begin)])
    return np.concatenate(parts)
