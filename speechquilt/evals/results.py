"""results.json: one flat table of numbers, every one of them declared by whoever measured it.

Trap: a number that no producer in the recipe's `Schema` declares cannot be written; a new measure starts with a line in its
producer's `MEASURES`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt.config import nearest
from speechquilt.evals.intervals import Difference
from speechquilt.evals.measures import KINDS, Chart, Measure, Promise, Value, Verdict, fits, sibling, under
from speechquilt.files import write_json

_SCORE = (
    Measure(key="low", kind="share", meaning="lower end of the accuracy's 95 % interval (Wilson, items of a cluster count as one)"),
    Measure(key="high", kind="share", meaning="upper end of the same interval"),
    Measure(key="n", kind="count", meaning="items"),
    Measure(key="clusters", kind="count", meaning="distinct facts or stories the items are about"),
    Measure(key="chance", kind="share", meaning="accuracy of guessing"),
    Measure(key="version", kind="count", meaning="version of the task"),
)  # fmt: skip
BY_SUM = Measure(
    key="accuracy_sum", kind="share", meaning="the same by summed instead of mean log-probability of the ending"
)
FIRST = Measure(
    key="accuracy_first", kind="share", meaning="the same, and no other possible answer is named before the right one"
)
_DIFFERENCE = (
    Measure(key="low", kind="difference", meaning="lower end of its 95 % interval (paired bootstrap over facts)"),
    Measure(key="high", kind="difference", meaning="upper end of the same interval"),
    Measure(key="n", kind="count", meaning="items"),
    Measure(key="clusters", kind="count", meaning="distinct facts"),
    Measure(key="with", kind="share", meaning="accuracy with interleaved data in the mixture"),
    Measure(key="without", kind="share", meaning="accuracy without, everything else equal"),
)


@dataclass(frozen=True)
class Schema:
    """The measures of one recipe's producers, in the order of its tables."""

    measures: tuple[Measure, ...]

    def __post_init__(self) -> None:
        keys = [m.key for m in self.measures]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"measures {', '.join(twice)} are declared twice; each belongs to one producer")

    def measure(self, key: str) -> Measure:
        """The declaration of a key. Raises ValueError with the nearest keys."""
        for measure in self.measures:
            if measure.match(key) is not None:
                return measure
        raise ValueError(f"unknown result key {key!r}; {nearest(key, self._completed(key.split('.')))}")

    def check(self, results: Mapping[str, Any]) -> None:
        """Raises ValueError naming the first key or value that is not declared."""
        for key, value in results.items():
            rule, allowed = KINDS[self.measure(key).kind]
            if not allowed(value):
                raise ValueError(f"result {key}={value!r} must be {rule}; leave the key out when it was not measured")

    def promised_keys(self) -> list[str]:
        return [key for measure in self.measures for key, *_ in measure.promised()]

    def verdicts(self, results: Mapping[str, Any]) -> list[Verdict]:
        """Every promise held against the results; what was not measured was not kept."""
        return [
            Verdict(
                name=name,
                target=bound.text,
                value=_with_interval(measure, key, results) if key in results else "not measured",
                met=key in results and bound.kept(results, key),
            )
            for measure in self.measures
            for key, name, bound in measure.promised()
        ]

    def markdown(self) -> str:
        """Every measure as a row of a Markdown table."""
        rows = [
            f"| `{m.key}` | {KINDS[m.kind][0]}{f', in {m.unit}' if m.unit else ''} | {m.meaning} |"
            for m in self.measures
        ]
        return "\n".join(["| key | value | meaning |", "| --- | --- | --- |", *rows]) + "\n"

    def _completed(self, parts: list[str]) -> list[str]:
        """Every pattern with its wildcards filled from the key at hand where they fit, so that a near miss looks near."""
        completed = []
        for measure in self.measures:
            wanted = measure.key.split(".")
            filled = [p if w.startswith("<") and fits(w, p) else w for w, p in zip(wanted, parts)]
            completed.append(".".join(filled + wanted[len(filled) :]))
        return completed


def _with_interval(measure: Measure, key: str, results: Mapping[str, Any]) -> str:
    text = measure.shown(results[key])
    low, high, n = (results.get(sibling(key, name)) for name in ("low", "high", "n"))
    if low is not None and high is not None:
        text += (
            f" [{low:.3f}, {high:.3f}]"
            if measure.kind in ("amount", "change")
            else f" [{100 * low:.0f}, {100 * high:.0f}]"
        )
    return text if n is None or low is None else f"{text}, n={n}"


def write_results(path: Path, results: Mapping[str, Value], schema: Schema) -> Path:
    """Check, sort and write the flat table; an existing file is replaced whole or not at all."""
    schema.check(results)
    path = Path(path)
    write_json(path, dict(sorted(results.items())))
    return path


def read_results(path: Path, schema: Schema) -> dict[str, Value]:
    """Read and check what `write_results` wrote. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the evals stage of a run writes it")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the evals stage again") from error
    schema.check(results)
    return results


def task_results(prefix: str, result: Mapping[str, Any]) -> dict[str, Value]:
    """The flat lines of one task's result: `task_results("lm.lst.story.topic.SS", task.run(scorer))`."""
    measured = result["accuracy"]
    lines: dict[str, Value] = {f"{prefix}.{k}": measured[k] for k in ("low", "high", "n", "clusters")}
    lines |= {f"{prefix}.{k}": result[k] for k in ("chance", "version")}
    return lines | {f"{prefix}.{k}": result[k]["value"] for k in result if k.startswith("accuracy")}


def task_measures(
    prefix: str, what: str, other: Measure, *, chart: Chart | None = None, promise: Promise | None = None
) -> tuple[Measure, ...]:
    """The declarations of what `task_results` gives; `other` is the task's second accuracy, `BY_SUM` or `FIRST`."""
    meaning = f"{what}: share of items answered right"
    accuracy = Measure(key=f"{prefix}.accuracy", kind="share", meaning=meaning, chart=chart, promise=promise)
    return (accuracy, *under(prefix, what, (*_SCORE, other)))


def transfer_results(
    prefix: str, difference: Difference, accuracy_with: float, accuracy_without: float
) -> dict[str, Value]:
    """The flat lines of one paired difference: `transfer_results("facts.transfer.text.ST", ...)`."""
    lines: dict[str, Value] = {f"{prefix}.{k}": v for k, v in vars(difference).items() if k != "value"}
    return lines | {
        f"{prefix}.difference": difference.value,
        f"{prefix}.with": accuracy_with,
        f"{prefix}.without": accuracy_without,
    }


def transfer_measures(
    prefix: str, what: str, *, chart: Chart | None = None, promise: Promise | None = None
) -> tuple[Measure, ...]:
    """The declarations of what `transfer_results` gives."""
    meaning = f"{what}: accuracy with minus accuracy without, on the same items"
    difference = Measure(key=f"{prefix}.difference", kind="difference", meaning=meaning, chart=chart, promise=promise)
    return (difference, *under(prefix, what, _DIFFERENCE))
