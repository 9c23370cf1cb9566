"""Sums on their way to means, and `metrics.jsonl`, the one record of a training run.

One line per logged step: `step`, `loss`, `lr`, `grad_norm`, the objective's scalars (means since the line before; null
when nothing was counted), its `total_*` (since the start of the run), `seconds` (of training, over all resumes), `rate`
(steps per second), `tokens_per_s`, `units_per_s`, `mfu` (over all ranks, where known, see `throughput`), `spikes`
(since the start of the run, when they are looked for), `warning` (where something is wrong with the model).

A resumed run cuts the lines past its checkpoint, so the file reads like that of a run that was never killed, except for
TIMING.
Trap: reading a tensor waits for the GPU. `Sums` keeps everything as tensors and is read only when a line is written.
"""

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from speechquilt.train.loggers import LoggerName, Loggers

FILE = "metrics.jsonl"
TIMING = ("seconds", "rate", "tokens_per_s", "units_per_s", "mfu")
RESERVED = {"step", "loss", "weight", "lr", "grad_norm", "spikes", "warning", *TIMING}


class Sums:
    """Named sums in float64 on one device: `window` since the last line, `totals` since the start of the run."""

    def __init__(self) -> None:
        self.window: dict[str, torch.Tensor] = {}
        self.totals: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        for name, value in sums.items():
            into = self.totals if name.startswith("total_") else self.window
            into[name] = into[name] + value if name in into else value

    def means(self) -> dict[str, float | None]:
        """The window's means: `x / x_weight` where that weight exists, else `x / weight`."""
        values = _read(self.window)
        means: dict[str, float | None] = {}
        for name, value in values.items():
            if name != "weight" and not name.endswith("_weight"):
                weight = values.get(f"{name}_weight", values["weight"])
                means[name] = value / weight if weight else None
        return means

    def read_totals(self) -> dict[str, float]:
        return _read(self.totals)

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain JSON data; a Python float holds a float64 exactly."""
        return {"window": _read(self.window), "totals": _read(self.totals)}

    def load_state_dict(self, state: dict[str, dict[str, float]], device: torch.device) -> None:
        def tensors(values: dict[str, float]) -> dict[str, torch.Tensor]:
            return {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in values.items()}

        self.window, self.totals = tensors(state["window"]), tensors(state["totals"])


class MetricsFile:
    """Appends lines to `run_dir/metrics.jsonl`; opening it at a step cuts every line past that step.

    With `writes` False (ranks other than 0) nothing is touched. `loggers` are shown the same lines, under `title`.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int,
        *,
        writes: bool = True,
        loggers: Sequence[LoggerName] = (),
        title: str = "train",
    ) -> None:
        self.path = run_dir / FILE
        self._file = None
        if writes:
            self._loggers = Loggers(loggers, run_dir, step, title)
            _cut(self.path, step)
            self._file = self.path.open("ab", buffering=0)  # a line is on its way when `write` returns

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
            self._loggers.close()

    def write(self, line: dict[str, Any]) -> None:
        """Append one line. Raises OSError naming the file when there is no room for it."""
        if self._file is None:
            return
        data = (json.dumps(line) + "\n").encode()
        try:
            room = self._file.write(data) == len(data)
        except OSError as error:
            raise OSError(error.errno, f"{self.path}: {error.strerror}; free some space and run again") from error
        if not room:
            raise OSError(errno.ENOSPC, f"{self.path}: no space left; free some space and run again")
        self._loggers.write(line)

    def sync(self) -> None:
        """Lines on disk before the checkpoint that counts on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` (or of the run folder that holds it); half a last line, left by a kill, is
    dropped.

    Raises FileNotFoundError, or ValueError naming a broken line.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; training writes one into its run folder")
    texts = path.read_text().split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], 1):  # what follows the last newline is unfinished or empty
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); delete that line") from error
    return lines


def _cut(path: Path, step: int) -> None:
    """Drop the lines past `step`, whole file or not at all."""
    if path.is_file():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)


def _read(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """All values with one wait for the device."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
