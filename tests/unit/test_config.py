"""Configs are strict: a wrong key or type is an error that names the nearest right one."""

import json
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from speechquilt import config
from speechquilt.commands.grammar import parse


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


def test_flags_reach_nested_fields_and_keep_types():
    words = "--inner.width 16 --rate 1 --name run --inner.betas 0.5 0.6 --kind aligned --weights text=0.3 --names a b"
    made = parse(Outer, words.split())
    assert made.inner == Inner(width=16, betas=(0.5, 0.6))
    assert made.rate == 1.0
    assert isinstance(made.rate, float)
    assert (made.name, made.kind) == ("run", "aligned")
    assert (made.weights, made.names) == ({"text": 0.3}, ("a", "b"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--step 3", "--steps"),
        ("--inner.widht 3", "--inner.width"),
        ("--iner.width 3", "--inner.width"),
        ("--steps many", "many"),
        ("--steps true", "true"),
        ("--steps 1.5", "1.5"),
        ("--kind mixed", "mixed"),
        ("--inner.betas 1.0", "--inner.betas"),
        ("steps", "steps"),
        ("--weights text", "KEY=VALUE"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Outer, words.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"step": 3}, "did you mean steps"),
        ({"inner": {"widht": 3}}, "did you mean width"),
        ({"iner": {"width": 3}}, "did you mean inner"),
        ({"steps": "many"}, "steps='many' has type str; int is expected"),
        ({"steps": True}, "steps=True has type bool"),
        ({"steps": 1.5}, "int is expected"),
        ({"kind": "mixed"}, "must be one of 'static', 'aligned'"),
        ({"inner": {"betas": [1.0]}}, "inner.betas"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(data, message, tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(Outer, ["--config", str(tmp_path / "settings.json")])


def test_a_saved_config_is_where_flags_start(tmp_path):
    config.save(Outer(steps=3, names=("a",), inner=Inner(width=4)), tmp_path / "settings.json")
    made = parse(Outer, [f"--config={tmp_path / 'settings.json'}", "--inner.width", "5"])
    assert made == Outer(steps=3, names=("a",), inner=Inner(width=5))


def test_a_missing_and_a_broken_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        config.load(Outer, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        config.load(Outer, tmp_path / "config.json")


def test_fingerprint_depends_on_values_alone():
    assert config.fingerprint(Outer()) == config.fingerprint(Outer())
    assert config.fingerprint(Outer(inner=Inner(width=9))) != config.fingerprint(Outer())
