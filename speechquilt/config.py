"""Strict configs: frozen keyword-only dataclasses read from JSON, with did-you-mean and a fingerprint.

A class keeps its config beside itself (`XConfig.build() -> X`); a run folder keeps the JSON of the config it was made
with.
Trap: values are checked against the annotation, so annotate with real types (int, float, bool, str, Path, tuple[...],
X | None, Literal, another config), never with strings or Any.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def nearest(key: str, known: Sequence[str]) -> str:
    """The did-you-mean part of an error message."""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known keys: {', '.join(sorted(known))}"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # a path is a string in JSON


def fingerprint(data: Any) -> str:
    """12 hex digits of a config or of plain JSON data; equal data, equal fingerprint, on every machine."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = to_dict(data)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def from_dict(cls: type[C], data: dict[str, Any], where: str = "") -> C:
    """Build a config, checking every key and type. Raises ValueError naming key, value, rule and remedy."""
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"unknown key {where + key!r} for {cls.__name__}; {nearest(key, list(hints))}")
    return cls(**{k: _coerce(hints[k], v, where + k) for k, v in data.items()})


def save(config: Any, path: Path) -> None:
    path.write_text(json.dumps(to_dict(config), indent=1) + "\n")


def load(cls: type[C], path: Path) -> C:
    """Read a config that `save` wrote. Raises FileNotFoundError or ValueError saying what is wrong with which file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a run folder has one, check the path of the run")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it or make the run again") from error
    return from_dict(cls, data)


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type, or a ValueError. JSON has no tuples, and 1 is a fine float; nothing else bends."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _coerce(options[0], value, key)
        for option in options:
            try:
                return _coerce(option, value, key)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(f"{key}={value!r} must be one of {', '.join(map(repr, args))}")
    elif origin is tuple:
        if isinstance(value, list | tuple):
            inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
            if len(inner) == len(value):
                return tuple(_coerce(t, v, f"{key}[{i}]") for i, (t, v) in enumerate(zip(inner, value)))
    elif origin is dict:
        if isinstance(value, dict):
            return {k: _coerce(args[1], v, f"{key}.{k}") for k, v in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return from_dict(hint, value, key + ".")
        if isinstance(value, hint):
            return value
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{key}={value!r} has type {type(value).__name__}; {name} is expected")
