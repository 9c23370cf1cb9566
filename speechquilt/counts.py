"""Counts by name, nested as deep as they need to be, and how two of them add up."""

from collections.abc import Mapping
from typing import Any

Counts = dict[str, Any]  # whole numbers by name, in any nesting


def add_counts(a: Mapping[str, Any], b: Mapping[str, Any]) -> Counts:
    """Number by number, however deep they lie; a name that one side lacks counts as nothing there."""
    added = {k: add_counts(a.get(k, {}), v) if isinstance(v, Mapping) else a.get(k, 0) + v for k, v in b.items()}
    return {**a, **added}
