"""Items of unequal length in a batch: which go together (longest first, nothing is drawn), and which places are padding."""

import sys
from collections.abc import Iterator, Sequence
from math import inf

from torch import Tensor, arange

SHORTEST = 1e-3  # lengths below it count as this much, so that empty items do not make a batch of all there is


def longest_first(lengths: Sequence[float], *, budget: float = inf, rows: int = sys.maxsize) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that too little memory shows at once.

    At most `rows` items each, and at most `budget` of length with the padding, in the unit of `lengths`; an item that is
    longer than that is alone. Of equal lengths the first comes first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        fit = max(1, int(min(rows, budget / max(lengths[order[first]], SHORTEST))))
        yield order[first : first + fit]
        first += fit


def valid_places(num_B: Tensor, longest: int) -> Tensor:
    """True where a row holds an item and not padding: bool `[B, longest]`, of rows that begin with `num_B` items."""
    return arange(longest, device=num_B.device) < num_B[:, None]
