"""One HTML file per page, from jinja2 templates: nothing else is needed to read it, and no network.

Trap: everything that is not `Markup` is escaped. Markup is made here, by the templates and by `charts`, never from a text of
a corpus.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from speechquilt.reports import charts

FOLD = 10  # a table of more rows is folded
_NUMBER = re.compile(r"[-+–−]?[\d.,]+( ?[%a-zA-Z]{1,6})?|–|")
_PAIR = re.compile(r"\b([ST])→([ST])\b")
_MODALITY = {"S": "speech", "T": "text"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """A table cell: an accuracy with its interval, drawn against chance."""

    value: float
    low: float
    high: float
    chance: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are finished text, or a `Score` drawn with its interval. The first column names the row. `legend`: what the
    columns mean, as (column, meaning)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    note: str = ""
    legend: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: a row has {len(row)} cells for {len(self.columns)} columns")

    @property
    def right(self) -> list[bool]:
        """Whether each column is aligned right: its cells are numbers."""
        return [
            column > 0 and all(isinstance(r[column], Score) or _NUMBER.fullmatch(str(r[column])) for r in self.rows)
            for column in range(len(self.columns))
        ]

    @property
    def scored(self) -> bool:
        return any(isinstance(cell, Score) for row in self.rows for cell in row)

    @property
    def folded(self) -> bool:
        return len(self.rows) > FOLD


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Render a template of this package into one self-contained file; returns its path. Raises jinja2.UndefinedError on a
    value that the template misses."""
    path = Path(path)
    path.write_text(environment().get_template(template).render(**values), encoding="utf-8")
    return path


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("speechquilt.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"pairs": pairs, "seconds": seconds, "data_uri": data_uri, "is_score": is_score, "percent": percent}
    made.globals |= {"colours": Markup(charts.colours_css())}
    return made


def pairs(text: str) -> Markup:
    """Escapes a text and colours the letters of "S→T" by modality."""

    def coloured(match: re.Match[str]) -> str:
        letters = (f'<span class="word {_MODALITY[a]}">{a}</span>' for a in match.groups())
        return f'<span class="pair">{"→".join(letters)}</span>'

    return Markup(_PAIR.sub(coloured, str(escape(text))))


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f} s" if value < 100 else f"{int(value // 60)} min {int(value % 60):02d} s"


def percent(share: float) -> str:
    """A position between 0 and 100 %, for a style."""
    return f"{100 * min(1.0, max(0.0, share)):.1f}%"


def is_score(cell: object) -> bool:
    return isinstance(cell, Score)


def data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
