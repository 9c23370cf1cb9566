"""From a budget in units or tokens to a number of optimizer steps, before training starts.

Compute-controlled comparisons give every run the same units, data-controlled ones the same tokens (spec
latent-speech-text, 8).
Trap: a curriculum packs more into a step the further it is, so one look at the first batches is not enough: batches are
packed at points all along the run. It is a pure function of the data, the seed and the recipe, so a resumed run agrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from speechquilt.protocols import Loader, Patcher
from speechquilt.types import LaidOut

Budget = Literal["steps", "units", "tokens"]
POINTS = 12  # of the curriculum, evenly spaced
DOCUMENTS_PER_POINT = 300
BATCHES_PER_POINT = 4  # at least; the first of a loader has the widest choice of documents and is not counted


@dataclass(frozen=True)
class AtProgress:
    """A patcher that stands still at one point of its curriculum."""

    patcher: Patcher
    progress: float

    @property
    def causal(self) -> bool:
        return self.patcher.causal

    def __call__(self, laid_out: LaidOut, draw: float, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        return self.patcher(laid_out, draw, self.progress)

    def init_state(self) -> Any:
        return self.patcher.init_state()

    def step(self, token_id: int, is_speech: bool, state: Any) -> tuple[bool, bool, Any]:
        return self.patcher.step(token_id, is_speech, state)


def steps_for(
    budget: Literal["units", "tokens"], amount: int, accumulate: int, loader_at: Callable[[float], Loader]
) -> int:
    """Optimizer steps, at least 1, that see about `amount` units or tokens in all.

    `loader_at(progress)` gives a loader of global batches as they are at that share of the run, with `meta` as the packer
    counts it, or as `BaseTokenCounts` does: tokens are base speech tokens, text and special tokens, padding left out.
    A run so short that the packer's buffer is much of it lags behind its curriculum and sees a little more or less.
    """
    per_batch = [_per_batch(loader_at((point + 0.5) / POINTS), budget) for point in range(POINTS)]
    return max(1, round(amount / (accumulate * sum(per_batch) / POINTS)))


def _per_batch(loader: Loader, count: str) -> float:
    loader.next_batch()
    total = batches = documents = 0
    while batches < BATCHES_PER_POINT or documents < DOCUMENTS_PER_POINT:
        meta = loader.next_batch().meta
        total += meta[count]
        documents += sum(meta["documents"].values())
        batches += 1
    return total / batches
