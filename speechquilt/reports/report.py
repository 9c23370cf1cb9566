"""One self-contained report.html: what was promised, what came out, and pictures of how, from plain data.

Place in the pipeline: the last stage of a recipe fills a `ReportData`; this knows no recipe.
Trap: everything shown is escaped and nothing is loaded from elsewhere: no script, no link, no font; a missed promise is
printed as MISSED with its number.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from speechquilt.reports import figures
from speechquilt.reports.figures import Curve, Score, UtteranceView
from speechquilt.types import Modality

MAX_TOKENS = 72  # speech tokens shown of one run of a sample; the rest is counted


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One promised number: `target` and `value` as text ("≤ 5 %", "1.2 %"), and whether it was met."""

    name: str
    target: str
    value: str
    met: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One box of the pipeline picture. `icon` is a name of `figures.ICONS`; `made` says what came out; `seconds` None
    when it was not run this time."""

    icon: str
    name: str
    made: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """One span of an interleaved sample. Text: its `text`. Speech: the `text` read back from its tokens, the ids, and
    per token whether it opens a patch (empty: every token does) and whether it ends a word (empty: unknown)."""

    modality: Modality
    text: str
    ids_T: Sequence[int] = ()
    opens_T: Sequence[bool] = ()
    word_end_T: Sequence[bool] = ()

    def __post_init__(self) -> None:
        for name in ("opens_T", "word_end_T"):
            if len(getattr(self, name)) not in (0, len(self.ids_T)):
                raise ValueError(f"sample run: {name} has {len(getattr(self, name))} entries for {len(self.ids_T)} ids")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document of the training data."""

    label: str
    runs: Sequence[SampleRun]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are finished text, or a `Score` drawn with its interval. The first column names the row; a column whose cells
    are numbers is aligned right. "S→T" and the like in column names are coloured."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: a row has {len(row)} cells for {len(self.columns)} columns")


@dataclass(frozen=True, kw_only=True)
class Audio:
    """A player: `wav` is the content of a WAV file, `transcript` what is (meant to be) heard."""

    label: str
    wav: bytes
    transcript: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report shows, in the order of its sections; an empty part leaves its section out.

    `lead`: one or two sentences under the title. `curves`: one per training run. `table_sections`: heading -> tables.
    `facts`: what was run, as (name, value): config, machine, versions.
    """

    title: str
    lead: str
    verdicts: Sequence[Verdict] = ()
    stages: Sequence[Stage] = ()
    curves: Sequence[Curve] = ()
    curves_note: str = ""
    utterance: UtteranceView | None = None
    utterance_note: str = ""
    samples: Sequence[Sample] = ()
    samples_note: str = ""
    table_sections: Sequence[tuple[str, Sequence[Table]]] = ()
    audios: Sequence[Audio] = ()
    audios_note: str = ""
    facts: Sequence[tuple[str, str]] = ()


def write_report(path: Path, data: ReportData) -> Path:
    """Write one HTML file that needs no other file and no network; returns its path."""
    sections = [
        ("Pipeline", _pipeline(data.stages)),
        *((heading, "".join(map(table_html, tables))) for heading, tables in data.table_sections),
        ("Learning curves", _curves(data.curves, data.curves_note)),
        ("One utterance in detail", _utterance(data.utterance, data.utterance_note)),
        ("Interleaved samples", _samples(data.samples, data.samples_note)),
        ("Listen", _audios(data.audios, data.audios_note)),
        ("What was run", _facts(data.stages, data.facts)),
    ]
    head = f'<p class="lead">{escape(data.lead)}</p>{_verdicts(data.verdicts)}'
    return write_html(path, data.title, head, sections)


def write_html(path: Path, title: str, head: str, sections: Sequence[tuple[str, str]], css: Sequence[str] = ()) -> Path:
    """Write one self-contained page; returns its path. `head` and the bodies of the (heading, body) `sections` are HTML, a
    section without a body is left out; `css`: more style sheets of this package."""
    sections = [(heading, body) for heading, body in sections if body]
    here = resources.files("speechquilt.reports")
    style = "".join(here.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", *css))
    links = "".join(f'<a href="#s{k}">{escape(h)}</a>' for k, (h, _) in enumerate(sections))
    body = "".join(f'<section id="s{k}"><h2>{escape(h)}</h2>{b}</section>' for k, (h, b) in enumerate(sections))
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1>{head}</header><nav>{links}</nav>{body}</main></body></html>\n"
    )
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    met = sum(v.met for v in verdicts)
    missed = len(verdicts) - met
    count = f"{met} of {len(verdicts)} promised results met" + (f", {missed} MISSED" if missed else "")
    cards = "".join(
        f'<li class="{"met" if v.met else "missed"}"><span class="badge">{"met" if v.met else "MISSED"}</span>'
        f'<span class="name">{escape(v.name)}</span><span class="value">{escape(v.value)}</span>'
        f'<span class="target">promised {escape(v.target)}</span>{_note(v.note)}</li>'
        for v in verdicts
    )
    return f'<p class="count">{count}</p><ul class="verdicts">{cards}</ul>'


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _pipeline(stages: Sequence[Stage]) -> str:
    if not stages:
        return ""
    boxes = "".join(
        f'<li>{figures.stage_icon(s.icon)}<div><b><i>{k}</i>{escape(s.name)}</b><span class="made">{escape(s.made)}</span>'
        f'<span class="time">{_seconds(s.seconds)}</span></div></li>'
        for k, s in enumerate(stages, start=1)
    )
    return f'<ol class="pipeline">{boxes}</ol>{_KEY}'


_KEY = (
    '<p class="key"><span class="chip text">text</span> and <span class="chip speech">speech</span> '
    "keep these two colours everywhere on this page.</p>"
)


def _curves(curves: Sequence[Curve], note: str) -> str:
    if not curves:
        return ""
    legend = "".join(
        f'<li><svg viewBox="0 0 34 8" aria-hidden="true"><line x1="0" x2="34" y1="4" y2="4" {figures.run_style(k)}/></svg>'
        f"{escape(c.name)}</li>"
        for k, c in enumerate(curves)
    )
    panels = []
    for modality, loss in (("speech", "speech_loss"), ("text", "text_loss")):
        for axis, label in (("units", "global units seen in training"), ("flops", "training compute, FLOPs")):
            lines = [(k, getattr(c, axis), getattr(c, loss)) for k, c in enumerate(curves)]
            title = f'loss per <span class="word {modality}">{modality} token</span>, nats'
            panels.append(f"<figure><figcaption>{title}</figcaption>{figures.line_chart(lines, label)}</figure>")
    return f'{_note(note)}<ul class="legend">{legend}</ul><div class="charts">{"".join(panels)}</div>'


def _utterance(view: UtteranceView | None, note: str) -> str:
    if view is None:
        return ""
    return f'{_note(note)}<div class="scroll">{figures.utterance_svg(view)}</div>'


def _samples(samples: Sequence[Sample], note: str) -> str:
    if not samples:
        return ""
    key = (
        '<p class="key"><span class="chip text">text</span> <span class="chip speech">speech</span> read back from its '
        'tokens; <span class="patch"><b>17</b><b>204</b><b class="end">9</b></span> one frame is one patch, '
        "a thick edge ends a word.</p>"
    )
    parts = []
    for sample in samples:
        runs = "".join(map(_run, sample.runs))
        parts.append(
            f'<article class="sample"><h3>{escape(sample.label)}</h3>{_note(sample.note)}<div>{runs}</div></article>'
        )
    return _note(note) + key + "".join(parts)


def _run(run: SampleRun) -> str:
    if run.modality == "text":
        return f'<span class="run text">{escape(run.text)}</span>'
    shown = min(MAX_TOKENS, len(run.ids_T))
    opens_T = run.opens_T if len(run.opens_T) else [True] * len(run.ids_T)  # without patches every token is a unit
    word_end_T = run.word_end_T if len(run.word_end_T) else [False] * len(run.ids_T)
    tokens: list[str] = []
    for t in range(shown):
        if opens_T[t] or t == 0:
            tokens.append('</span><span class="patch">' if tokens else '<span class="patch">')
        tokens.append(f'<b class="end">{run.ids_T[t]}</b>' if word_end_T[t] else f"<b>{run.ids_T[t]}</b>")
    more = f"<i>+ {len(run.ids_T) - shown} more</i>" if len(run.ids_T) > shown else ""
    boxes = f'<span class="tokens">{"".join(tokens)}</span>{more}</span>' if tokens else ""
    return f'<span class="run speech">{escape(run.text)}{boxes}</span>'


def table_html(table: Table) -> str:
    """A table under its title; on a phone every row is a card."""
    number = re.compile(r"[-+–−]?[\d.,]+( ?[%a-zA-Z]{1,4})?|–|")
    right = [
        column > 0 and all(isinstance(row[column], Score) or number.fullmatch(str(row[column])) for row in table.rows)
        for column in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{_right(r)}>{_coloured_pairs(escape(name))}</th>' for name, r in zip(table.columns, right)
    )
    rows = []
    for row in table.rows:
        cells = "".join(
            f'<td{_right(r)} data-column="{escape(name)}">{_cell(cell)}</td>'
            for cell, r, name in zip(row[1:], right[1:], table.columns[1:])
        )
        rows.append(f'<tr><th scope="row">{_cell(row[0])}</th>{cells}</tr>')
    scored = any(isinstance(cell, Score) for row in table.rows for cell in row)
    narrow = ' class="narrow"' if len(table.columns) <= 3 else ""
    key = _note(
        "Bar: 95 % interval and value from 0 to 100 %; tick: chance; coloured when the interval is clear of it."
    )
    return (
        f'<article class="table"><h3>{_coloured_pairs(escape(table.title))}</h3>{_note(table.note)}<div class="scroll">'
        f"<table{narrow}><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{key if scored else ''}</article>"
    )


def _right(right: bool) -> str:
    return ' class="right"' if right else ""


def _cell(cell: str | Score) -> str:
    if not isinstance(cell, Score):
        return _coloured_pairs(escape(str(cell)))
    low, high = round(100 * cell.low), round(100 * cell.high)
    number = f"<b>{100 * cell.value:.1f} %</b> <small>{low}–{high}</small>"
    return f'<span class="scored">{number}{figures.score_svg(cell)}</span>'


def _coloured_pairs(escaped: str) -> str:
    """Colours the letters of "S→T" by modality."""
    names = {"S": "speech", "T": "text"}

    def pair(match: re.Match[str]) -> str:
        a, b = match.groups()
        return f'<span class="pair"><span class="word {names[a]}">{a}</span>→<span class="word {names[b]}">{b}</span></span>'

    return re.sub(r"\b([ST])→([ST])\b", pair, escaped)


def _audios(audios: Sequence[Audio], note: str) -> str:
    if not audios:
        return ""
    players = "".join(
        f'<figure class="audio"><figcaption><b>{escape(a.label)}</b></figcaption>'
        f'<audio controls preload="metadata" src="{figures.data_uri("audio/wav", a.wav)}"></audio>'
        f"<blockquote>{escape(a.transcript)}</blockquote>{_note(a.note)}</figure>"
        for a in audios
    )
    return f'{_note(note)}<div class="audios">{players}</div>'


def _facts(stages: Sequence[Stage], facts: Sequence[tuple[str, str]]) -> str:
    timed = [s for s in stages if s.seconds is not None]
    longest = max((s.seconds or 0 for s in timed), default=0) or 1
    bars = "".join(
        f'<tr><th scope="row">{escape(s.name)}</th><td class="right">{_seconds(s.seconds)}</td><td class="wide">'
        f'<span class="bar" style="width:{100 * (s.seconds or 0) / longest:.1f}%"></span></td></tr>'
        for s in timed
    )
    if timed:
        total = _seconds(float(np.sum([s.seconds for s in timed])))
        bars = f'<table class="times"><tbody>{bars}<tr><th scope="row">all stages</th><td class="right">{total}</td><td></td></tr></tbody></table>'
    rows = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return bars + (f"<dl>{rows}</dl>" if rows else "")
