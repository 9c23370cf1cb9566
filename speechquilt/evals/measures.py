"""What a measured number is: its key, unit and meaning, what is promised of it, and the chart that shows it.

Whoever measures a number declares it beside the code, in a `MEASURES` tuple. A recipe lists the tuples of its producers in
one `results.Schema`; the check of results.json, its documentation, the report's tables, charts and promises follow from that.
Trap: `<name>` in a key stands for exactly one part between dots. A bound stands in its promise and nowhere else; nothing may
lower one to pass.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Value = bool | int | float | str
Kind = Literal["share", "difference", "rate", "amount", "change", "count", "flag", "text"]
ARROWS = {a + b: f"{a}→{b}" for a in "ST" for b in "ST"}  # <pair>: modality of prompt and ending


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "share": ("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1),
    "difference": ("a number from -1 to 1", lambda x: _is_number(x) and -1 <= x <= 1),
    "rate": ("a number not below 0; 1 is as many errors as units", lambda x: _is_number(x) and x >= 0),
    "amount": ("a number not below 0", lambda x: _is_number(x) and x >= 0),
    "change": ("a number", _is_number),
    "count": ("a whole number not below 0", lambda x: type(x) is int and x >= 0),
    "flag": ("true or false", lambda x: type(x) is bool),
    "text": ("a string", lambda x: type(x) is str),
}
WILDCARDS = {
    "pair": ("SS, ST, TS or TT (prompt, ending)", re.compile("[ST]{2}")),
    "": ("letters, digits, _ and -", re.compile("[A-Za-z0-9_-]+")),
}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a promise asks of the results at a key; `text` says it in a few words."""

    text: str
    kept: Callable[[Mapping[str, Any], str], bool]


def at_most(share: float) -> Bound:
    return Bound(text=f"≤ {100 * share:g} %", kept=lambda flat, key: flat[key] <= share)


def at_most_amount(amount: float, unit: str) -> Bound:
    return Bound(text=f"≤ {amount:g} {unit}", kept=lambda flat, key: flat[key] <= amount)


def at_least(share: float) -> Bound:
    return Bound(text=f"≥ {100 * share:g} %", kept=lambda flat, key: flat[key] >= share)


def is_true() -> Bound:
    return Bound(text="yes", kept=lambda flat, key: flat[key] is True)


def above_chance() -> Bound:
    """The lower end of the interval (`low` beside the key) lies above guessing (`chance`)."""
    return Bound(
        text="interval above chance", kept=lambda flat, key: flat[sibling(key, "low")] > flat[sibling(key, "chance")]
    )


def at_chance() -> Bound:
    """The interval (`low`, `high` beside the key) holds guessing (`chance`): what a control must fall to."""

    def kept(flat: Mapping[str, Any], key: str) -> bool:
        return flat[sibling(key, "low")] <= flat[sibling(key, "chance")] <= flat[sibling(key, "high")]

    return Bound(text="interval holds chance", kept=kept)


def above_zero() -> Bound:
    """The lower end of the interval (`low` beside the key) lies above 0."""
    return Bound(text="interval above 0", kept=lambda flat, key: flat[sibling(key, "low")] > 0)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """`name` and the measure's key may hold wildcards; `where` gives the values of each for which the bound is promised, and
    `words` how a value is called where its own name says too little."""

    name: str
    bound: Bound
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Every measured key of the pattern as a point with its interval (`low`, `high`) and chance, where they stand beside it.

    One row per value of the wildcards but `series`, which is told by colour; `where` keeps the values named, and `words` is
    how a value is called where its own name says too little.
    """

    title: str
    series: str = "run"
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """`key`: a pattern such as "lm.<run>.units". `unit` of an amount or a change: "s", "ms", "nats" ... Several promises: other
    values of the wildcards, other bounds."""

    key: str
    kind: Kind
    meaning: str
    unit: str = ""
    promise: Promise | tuple[Promise, ...] | None = None
    chart: Chart | None = None

    @property
    def promises(self) -> tuple[Promise, ...]:
        if self.promise is None:
            return ()
        return self.promise if isinstance(self.promise, tuple) else (self.promise,)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"measure {self.key!r}: kind={self.kind!r} must be one of {', '.join(KINDS)}")
        known = set(wildcards_of(self.key))
        parts: list[Promise | Chart] = [*self.promises, *([self.chart] if self.chart else [])]
        for part in parts:
            if not set(part.where) <= known:
                raise ValueError(
                    f"measure {self.key!r}: where={dict(part.where)} must name wildcards of the key, {sorted(known)}"
                )
        if any(set(promise.where) != known for promise in self.promises):
            raise ValueError(f"measure {self.key!r}: its promise must say for which values of {sorted(known)} it holds")

    def match(self, key: str) -> dict[str, str] | None:
        """The wildcards' values when this measure declares `key`."""
        wanted, parts = self.key.split("."), key.split(".")
        if len(wanted) != len(parts) or not all(fits(w, p) for w, p in zip(wanted, parts)):
            return None
        return {w.strip("<>"): p for w, p in zip(wanted, parts) if w.startswith("<")}

    def shown(self, value: Value) -> str:
        """A value as people read it: "3.9 %", "yes", "12.5 Hz"."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value
        if self.kind in ("share", "difference", "rate"):
            return f"{100 * value:.1f} %"
        if abs(value) >= 100_000:
            return si(value) + self.unit
        number = f"{value:,}" if isinstance(value, int) else f"{value:{'+.3f' if self.kind == 'change' else '.4g'}}"
        return f"{number} {self.unit}".rstrip()

    def promised(self) -> list[tuple[str, str, Bound]]:
        """(key, name, bound) of everything promised."""
        found = []
        for promise in self.promises:
            for chosen in itertools.product(*promise.where.values()):
                values = dict(zip(promise.where, chosen))
                name = fill(promise.name, shown_values(values, promise.words))
                found.append((fill(self.key, values), name, promise.bound))
        return found


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One promised number: `target` and `value` as text ("≤ 5 %", "1.2 %"), and whether it was met."""

    name: str
    target: str
    value: str
    met: bool
    note: str = ""


def si(x: float) -> str:
    """1234567 -> "1.23 M"; three figures at most."""
    for limit, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def under(prefix: str, what: str, fields: Sequence[Measure]) -> tuple[Measure, ...]:
    """The measures of one family, each key and meaning under its own."""
    return tuple(Measure(key=f"{prefix}.{f.key}", kind=f.kind, meaning=f"{what}: {f.meaning}") for f in fields)


def sibling(key: str, name: str) -> str:
    """The key beside `key` with another last part."""
    return f"{key.rpartition('.')[0]}.{name}"


def wildcards_of(pattern: str) -> list[str]:
    return re.findall("<([^>]*)>", pattern)


def fits(wanted: str, part: str) -> bool:
    """Whether a part of a key is what a part of a pattern allows."""
    if not wanted.startswith("<"):
        return wanted == part
    _, rule = WILDCARDS.get(wanted.strip("<>"), WILDCARDS[""])
    return rule.fullmatch(part) is not None


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """A pattern with its wildcards replaced."""
    for name, value in values.items():
        pattern = pattern.replace(f"<{name}>", value)
    return pattern


def shown_values(values: Mapping[str, str], words: Mapping[str, str]) -> dict[str, str]:
    """Wildcards' values as people read them: "SS" is "S→S", "no_interleaving" is "no interleaving", or by `words`."""
    arrows = ARROWS if "pair" in values else {}
    return {name: words.get(v) or arrows.get(v) or v.replace("_", " ") for name, v in values.items()}
