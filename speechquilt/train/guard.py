"""What watches over the steps: a NaN ends the run, a spike is reported or skipped, and both name the batch that did it.

Loss and gradient norm are sums over all ranks, so every rank finds the same steps, and all of them can exchange the
names of their batches.
Trap: reading a number waits for the device. Steps are therefore noted as tensors and read in `check`, all at once.
"""

import math
import statistics
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from speechquilt.train import distributed

WINDOW = 64  # steps whose median is the running one
FEWEST = 16  # steps before anything counts as a spike
TOLD = 500  # characters of an error about batches


@dataclass(frozen=True)
class BatchOutcome:
    """One batch of this rank: summed loss and weight on the device, and what the loader says about it."""

    loss: torch.Tensor
    weight: torch.Tensor
    meta: Any


@dataclass(frozen=True)
class StepOutcome:
    """One step over all ranks, and this rank's batches of it."""

    step: int
    loss: torch.Tensor
    weight: torch.Tensor
    grad_norm: torch.Tensor
    batches: list[BatchOutcome]


class BadStep(ValueError):
    """A step whose loss, weight or gradient norm cannot be used."""


class StepGuard:
    """Reads the steps noted since it last looked.

    A spike is a mean loss or a gradient norm above `spike_factor` times its median over the last WINDOW steps (spikes
    included, so that a new level becomes the normal one). None: nothing is a spike.
    """

    def __init__(self, spike_factor: float | None) -> None:
        self.spike_factor = spike_factor
        self.spikes = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._unread: list[StepOutcome] = []

    def note(self, outcome: StepOutcome) -> None:
        self._unread.append(outcome)

    def forget(self) -> None:
        """Steps of a run that failed."""
        self._unread = []

    def check(self) -> bool:
        """Read the steps noted; returns whether the last of them was a spike, and warns of each.

        Raises BadStep for the first that is not finite or had nothing to predict.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return False
        table = torch.stack([torch.stack([x.double() for x in (o.loss, o.weight, o.grad_norm)]) for o in unread])
        spiked = False
        for outcome, (loss, weight, norm) in zip(unread, table.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm) and 0 < weight < math.inf):
                rule = "nothing to predict in any batch" if weight == 0 else "all must be finite, the weight positive"
                numbers = f"step {outcome.step}: loss {loss:g}, weight {weight:g}, gradient norm {norm:g}"
                raise BadStep(f"{numbers}; {rule}; {_batches(outcome)}")
            spiked = self._is_spike(loss / weight, norm)
            if spiked:
                self.spikes += 1
                self._warn(outcome, loss / weight, norm)
            self._losses.append(loss / weight)
            self._norms.append(norm)
        return spiked

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data; everything noted must have been checked."""
        return {"spikes": self.spikes, "losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spikes = state["spikes"]
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self._norms = deque(state["norms"], maxlen=WINDOW)

    def _is_spike(self, loss: float, norm: float) -> bool:
        if self.spike_factor is None or len(self._losses) < FEWEST:
            return False
        usual_loss, usual_norm = statistics.median(self._losses), statistics.median(self._norms)
        return loss > self.spike_factor * usual_loss or norm > self.spike_factor * usual_norm

    def _warn(self, outcome: StepOutcome, loss: float, norm: float) -> None:
        told = _batches(outcome)
        if distributed.rank() == 0:
            warnings.warn(
                f"step {outcome.step} is a spike: loss {loss:g} (median {statistics.median(self._losses):g}), gradient norm "
                f"{norm:g} (median {statistics.median(self._norms):g}); {told}",
                stacklevel=3,
            )


def _batches(outcome: StepOutcome) -> str:
    """The batches of all ranks, highest mean loss first; when some losses are not finite, those alone."""
    ours = [(_mean(batch), distributed.rank(), str(batch.meta)[:TOLD]) for batch in outcome.batches]
    told = sorted((x for theirs in distributed.gather_objects(ours) for x in theirs), key=lambda entry: -entry[0])
    guilty = [entry for entry in told if entry[0] == math.inf] or told
    text = "; ".join(f"rank {rank}: {meta}" for _, rank, meta in guilty)
    return f"meta of its batches, highest loss first: {text[:TOLD]}"


def _mean(batch: BatchOutcome) -> float:
    """Loss per target; infinite when it is not finite, so that such a batch is named first."""
    loss, weight = float(batch.loss), float(batch.weight)
    return loss / max(weight, 1.0) if math.isfinite(loss) else math.inf
