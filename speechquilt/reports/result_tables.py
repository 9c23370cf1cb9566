"""Tables and charts of a results.json, as its measures are declared: a new measure is on the page without a line here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from speechquilt.evals.measures import ARROWS, Measure, fill, shown_values, sibling, wildcards_of
from speechquilt.evals.results import Schema
from speechquilt.reports.charts import Point
from speechquilt.reports.page import Score, Table
from speechquilt.reports.story_page import IntervalChart

INTERVAL = ("low", "high", "n", "clusters", "chance", "version")  # shown with the value they belong to
Found = list[tuple[dict[str, str], str]]  # the wildcards' values of a measured key, and the key


def score_charts(schema: Schema, flat: Mapping[str, Any], order: Sequence[str] = ()) -> list[IntervalChart]:
    """Every declared chart that has something to show. `order`: of runs, sets and the like."""
    flat = _ordered(schema, flat, order)
    made = [
        IntervalChart(title=measure.chart.title, points=_points(measure, flat), note=_chance_note(measure, flat))
        for measure in schema.measures
        if measure.chart is not None
    ]
    return [chart for chart in made if chart.points]


def result_tables(
    schema: Schema, flat: Mapping[str, Any], titles: Mapping[str, str], order: Sequence[str] = ()
) -> list[Table]:
    """One table per family of measures (keys that differ in their last part only), where something was measured.

    `titles`: family -> title, in the order of the tables; a family without one comes last and is called by its keys, one with
    "" is left out. `order`: of runs, sets and the like.
    """
    flat = _ordered(schema, flat, order)
    families: dict[str, list[Measure]] = {}
    for measure in schema.measures:
        families.setdefault(measure.key.rpartition(".")[0], []).append(measure)
    tables = [
        _family(family, titles.get(family, family), measures, flat)
        for family, measures in ({name: families[name] for name in titles if name in families} | families).items()
        if titles.get(family, family)
    ]
    return [table for table in tables if table.rows]


def _family(family: str, title: str, measures: Sequence[Measure], flat: Mapping[str, Any]) -> Table:
    wild = wildcards_of(family)
    if not wild:
        rows = [[_name(m), m.shown(flat[m.key]), m.meaning] for m in measures if m.key in flat]
        return Table(title=title, columns=("measure", "value", "meaning"), rows=rows)
    if len(wild) == 1:
        return _matrix(title, wild, measures, flat)
    first = measures[0]
    if first.kind == "share" and "pair" in wild:
        return _scores(title, first, [w for w in wild if w != "pair"], flat)
    return _with_intervals(title, first, [m for m in measures[1:] if _last(m) not in INTERVAL], wild, flat)


def _matrix(title: str, wild: Sequence[str], measures: Sequence[Measure], flat: Mapping[str, Any]) -> Table:
    """A row per value of the one wildcard, a column per measure."""
    used = [m for m in measures if _found(m, flat)]
    names = list(dict.fromkeys(values[wild[0]] for m in used for values, _ in _found(m, flat)))
    keys = [[fill(m.key, {wild[0]: name}) for m in used] for name in names]
    rows = [
        [name.replace("_", " "), *(m.shown(flat[key]) if key in flat else "–" for m, key in zip(used, line))]
        for name, line in zip(names, keys)
    ]
    columns = (wild[0], *(_name(m) for m in used))
    return Table(title=title, columns=columns, rows=rows, legend=[(_name(m), m.meaning) for m in used])


def _scores(title: str, measure: Measure, wild: Sequence[str], flat: Mapping[str, Any]) -> Table:
    """A row per value of the wildcards but `pair`, whose values are the columns. The last wildcard leads (set before run), so
    that what is to be compared stands together."""
    leading = wild[::-1]
    keys = {(tuple(values[name] for name in leading), values["pair"]): key for values, key in _found(measure, flat)}
    labels = list(dict.fromkeys(label for label, _ in keys))
    first = list(dict.fromkeys(label[0] for label in labels))
    pairs = [pair for pair in ARROWS if any(pair == own for _, own in keys)]
    rows = [
        [", ".join(label).replace("_", " "), *(_score(keys.get((label, pair)), flat) for pair in pairs)]
        for label in sorted(labels, key=lambda label: first.index(label[0]))
    ]
    columns = (", ".join(leading), *(ARROWS[pair] for pair in pairs))
    return Table(title=title, columns=columns, rows=rows, note=f"{measure.meaning[:1].upper()}{measure.meaning[1:]}.")


def _with_intervals(
    title: str, measure: Measure, others: Sequence[Measure], wild: Sequence[str], flat: Mapping[str, Any]
) -> Table:
    """A row per measured key: the value, its interval, and what else was measured."""
    rows = []
    for values, key in _found(measure, flat):
        low, high = (flat.get(sibling(key, name)) for name in ("low", "high"))
        interval = "–" if low is None or high is None else f"{measure.shown(low)} to {measure.shown(high)}"
        more = [m.shown(flat[sibling(key, _last(m))]) for m in others if sibling(key, _last(m)) in flat]
        rows.append([", ".join(shown_values(values, {}).values()), *more, measure.shown(flat[key]), interval])
    columns = (", ".join(wild), *(_name(m) for m in others), _name(measure), "95 % interval")
    legend = [(_name(m), m.meaning) for m in (*others, measure)]
    return Table(title=title, columns=columns, rows=rows, legend=legend)


def _points(measure: Measure, flat: Mapping[str, Any]) -> list[Point]:
    chart = measure.chart
    assert chart is not None
    points = []
    for values, key in _found(measure, flat):
        if any(values[name] not in allowed for name, allowed in chart.where.items()):
            continue
        shown = shown_values(values, chart.words)
        constant = [name for name, allowed in chart.where.items() if len(allowed) == 1]
        row = [text for name, text in shown.items() if name != chart.series and name not in constant]
        value = flat[key]
        points.append(
            Point(
                row=", ".join(row),
                series=shown.get(chart.series, ""),
                value=value,
                low=flat.get(sibling(key, "low"), value),
                high=flat.get(sibling(key, "high"), value),
                chance=flat.get(sibling(key, "chance")),
            )
        )
    return points


def _chance_note(measure: Measure, flat: Mapping[str, Any]) -> str:
    has_chance = any(flat.get(sibling(key, "chance")) for _, key in _found(measure, flat))
    return "Points with 95 % intervals" + ("; the tick is chance." if has_chance else ".")


def _score(key: str | None, flat: Mapping[str, Any]) -> Score | str:
    if key is None:
        return "–"
    value = flat[key]
    low, high = (flat.get(sibling(key, name), value) for name in ("low", "high"))
    return Score(value=value, low=low, high=high, chance=flat.get(sibling(key, "chance"), 0.0))


def _ordered(schema: Schema, flat: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The results with the wildcards' values named in `order` first, each in its turn."""
    place = {value: k for k, value in enumerate(order)}
    return dict(sorted(flat.items(), key=lambda item: [place.get(part, len(place)) for part in item[0].split(".")]))


def _found(measure: Measure, flat: Mapping[str, Any]) -> Found:
    matched = ((measure.match(key), key) for key in flat)
    return [(values, key) for values, key in matched if values is not None]


def _last(measure: Measure) -> str:
    return measure.key.rpartition(".")[2]


def _name(measure: Measure) -> str:
    return re.sub("_+", " ", _last(measure))
