"""Measurements on the way: a training pauses, its model is measured on what it never saw, and a line is noted.

Trap: a pause costs a checkpoint, from which training goes on; what is trained does not change by a bit.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechquilt.files import write_json
from speechquilt.train import distributed

HELD_OUT_FILE = "held_out.json"


def stops(every: int, last: int, folder: Path) -> Iterator[int]:
    """Steps at which training pauses: every multiple of `every` that has not been measured yet, and the last."""
    if every:
        measured = max((line["step"] for line in read_held_out(folder)), default=0)
        yield from range((measured // every + 1) * every, last, every)
    yield last


def read_held_out(folder: Path) -> list[dict[str, Any]]:
    """The measurements made during training, by step; [] when there are none."""
    path = folder / HELD_OUT_FILE
    return json.loads(path.read_text()) if path.is_file() else []


def note(folder: Path, line: dict[str, Any]) -> None:
    """Add a measurement, or replace that of the same step: a kill between measuring and the next stop repeats it."""
    if distributed.rank() == 0:
        kept = [before for before in read_held_out(folder) if before["step"] < line["step"]]
        write_json(folder / HELD_OUT_FILE, [*kept, line])
