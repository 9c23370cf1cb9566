"""Configs are strict: a wrong key or type is an error that names the nearest right one."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from speechquilt import config


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = 10
    rate: float = 0.5
    kind: Literal["static", "aligned"] = "static"
    name: str | None = None
    names: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    inner: Inner = Inner()


def test_round_trip_through_json(tmp_path):
    made = Outer(steps=3, name="x", names=("a", "b"), weights={"text": 0.3}, inner=Inner(width=4, betas=(0.1, 0.2)))
    config.save(made, tmp_path / "config.json")
    assert config.load(Outer, tmp_path / "config.json") == made


def test_overrides_reach_nested_fields_and_keep_types():
    made = config.override(Outer(), ["inner.width=16", "rate=1", "name=run", "inner.betas=[0.5,0.6]", "kind=aligned"])
    assert made.inner == Inner(width=16, betas=(0.5, 0.6))
    assert made.rate == 1.0
    assert isinstance(made.rate, float)
    assert (made.name, made.kind) == ("run", "aligned")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("step=3", "did you mean steps"),
        ("inner.widht=3", "did you mean width"),
        ("iner.width=3", "did you mean inner"),
        ("steps=many", "steps='many' has type str; int is expected"),
        ("steps=true", "steps=True has type bool"),
        ("steps=1.5", "int is expected"),
        ("kind=mixed", "must be one of 'static', 'aligned'"),
        ("inner.betas=[1.0]", "inner.betas"),
        ("steps", "write key=value"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(assignment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config.override(Outer(), [assignment])


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        config.load(Outer, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        config.load(Outer, tmp_path / "config.json")


def test_fingerprint_depends_on_values_alone():
    assert config.fingerprint(Outer()) == config.fingerprint(Outer())
    assert config.fingerprint(Outer(inner=Inner(width=9))) != config.fingerprint(Outer())
