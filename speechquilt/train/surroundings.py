"""What surrounds a training loop: stop requests, random generators, reproducible settings, the progress line.

The context managers put back what they found.
Trap: signal handlers can be set in the main thread only; a run in another thread cannot be asked to stop.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm


class StopRequest:
    """`asked` turns True on the first SIGTERM or SIGINT; a second one interrupts at once.

    Under torchrun a Ctrl-C reaches each rank twice, from the terminal and from torchrun: what comes within `patience_s`
    seconds of the first is the same wish.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self.asked, self.patience_s = False, patience_s
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._asked_at = True, time.monotonic()
        elif time.monotonic() >= self._asked_at + self.patience_s:
            raise KeyboardInterrupt


class LateNumber:
    """A number on the device, read one step later, when it is there without waiting. On a CPU it is read at once."""

    def __init__(self) -> None:
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def swap(self, value: torch.Tensor) -> float:
        """Hand in this step's number, get that of the step before (0 at first)."""
        if value.device.type != "cuda":
            return float(value)
        before = self._copy
        pinned = torch.empty((), dtype=value.dtype, pin_memory=True)
        pinned.copy_(value, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._copy = (pinned, done)
        if before is None:
            return 0.0
        before[1].synchronize()
        return float(before[0])


def generator_states(device: torch.device, rank: int) -> dict[str, torch.Tensor]:
    """torch's global generators, from which dropout draws; named by rank, for each has its own."""
    states = {f"cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, torch.Tensor], device: torch.device, rank: int) -> None:
    """The inverse. A rank without a state keeps its fresh seed."""
    if f"cpu.{rank}" in states:
        torch.set_rng_state(states[f"cpu.{rank}"])
    if f"cuda.{rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{rank}"], device)


@contextmanager
def reproducible(device: torch.device, num_threads: int | None) -> Iterator[None]:
    """Same inputs, same bits, on a CPU: a fixed number of threads and deterministic kernels."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only slows
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


class Progress:
    """Steps done, rate, time left and loss on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, name: str, step: int, last: int, *, shown: bool = True) -> None:
        settings: dict[str, Any] = {"mininterval": 0.5}
        if not sys.stderr.isatty():
            line = "{desc}: step {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            settings = {"mininterval": 10.0, "file": _Lines(), "bar_format": line}
        self._bar = tqdm(total=last, initial=step, desc=name, unit="step", disable=not shown, **settings)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, loss: float | None = None) -> None:
        """One step done; `loss` is shown from now on."""
        if loss is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update()


class _Lines:
    """A file for tqdm that ends lines instead of overwriting them, for logs."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()
