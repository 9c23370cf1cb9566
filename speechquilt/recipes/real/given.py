"""What the real story does not make itself: weights, voices and texts, each fetched by one command.

Trap: a stage that finds out after an hour that something is missing has wasted it; all is looked for before any work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Needed:
    """A file or folder that must be there, and what to do when it is not."""

    what: str
    path: Path
    remedy: str


def check(needed: Sequence[Needed]) -> None:
    """Raises FileNotFoundError naming all that is missing, and how to get it."""
    missing = [item for item in needed if not item.path.exists()]
    if missing:
        lines = (f"  {item.what}: no {item.path}; {item.remedy}" for item in missing)
        raise FileNotFoundError("\n".join(["the story needs what is not here:", *lines]))
