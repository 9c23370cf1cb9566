"""A page about a folder of shards: its numbers, small histograms, and documents coloured by modality with their words.

Place in the pipeline: `recipes/inspect.py` fills it; it knows no shard and no tokenizer. Looks as the report does (`report`).
Trap: texts come from corpora that nobody has read. Everything shown is escaped, and nothing is loaded from elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from speechquilt.reports.figures import si
from speechquilt.reports.report import Table, table_html, write_html
from speechquilt.text import spoken_form
from speechquilt.types import Modality

BARS = 32  # of a histogram, at most
TAIL = 0.99  # share of all that has bars of its own; the rest is the last bar
MAX_TEXT = 6000  # characters of an original text that are shown

UnitKind = Literal["word", "silence", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A word or silence of a spoken run: its local ids, its `text` when known, and after how many ids a piece ends."""

    kind: UnitKind
    ids_T: Sequence[int]
    text: str = ""
    pieces: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one modality. `text`: what is written or was to be spoken, "" when unknown; speech has its `units` and what
    was `heard` in its tokens (None: nobody listened)."""

    modality: Modality
    text: str
    num_tokens: int
    units: Sequence[Unit] = ()
    heard: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document with the original `text` behind it."""

    id: str
    source: str
    text: str
    runs: Sequence[Run]


HISTOGRAMS: dict[str, tuple[str, str]] = {  # name of `inspect`'s lengths -> (title, colour)
    "document_tokens": ("tokens per document", "both"),
    "text_run_tokens": ("text tokens per text run", "text"),
    "speech_run_words": ("words per spoken run", "speech"),
    "speech_run_tokens": ("speech tokens per spoken run", "speech"),
    "speech_unit_tokens": ("speech tokens per word or silence", "speech"),
}


def write_shard_page(
    path: Path,
    title: str,
    found: Mapping[str, Any],
    lengths: Mapping[str, Mapping[int, int]],
    samples: Sequence[Sample],
) -> Path:
    """Write one HTML file that needs no other file and no network; returns its path.

    `found`: what `inspect --json` prints; `lengths`: how often each length came, by the names in `HISTOGRAMS`.
    """
    tables = "".join(map(table_html, _tables(found)))
    charts = [(*HISTOGRAMS[name], counts) for name, counts in lengths.items() if sum(counts.values()) > 1]
    figures = "".join(
        f"<figure><figcaption>{escape(label)}</figcaption>{histogram_svg(counts, label, colour)}</figure>"
        for label, colour, counts in charts
    )
    sections = [
        ("Samples", _KEY + "".join(map(_sample, samples)) if samples else ""),
        ("Lengths", f'<div class="small">{figures}</div>' if figures else ""),
        ("Counts", tables),
        ("How it was made", _facts(found)),
    ]
    return write_html(path, title, _head(found), sections, css=["shard_page.css"])


def _head(found: Mapping[str, Any]) -> str:
    tokens, ratio = found["tokens"], found["stage"].get("ratio", found["ratio"])
    noise = found["noise"].get("all")
    numbers = [
        ("", si(found["documents"]), found["kind"]),
        ("text", si(tokens["text"]), "text tokens"),
        ("speech", si(tokens["speech"]), "speech tokens"),
        ("", _duration(found["speech_seconds"]), "of speech"),
        ("", "" if ratio is None else f"{ratio:.1%}", "of the words are speech"),
        ("", _figure(found["speech_tokens_per_word"]), "speech tokens per word"),
        ("", _figure(found["words_per_second"]), "words per second"),
        ("", _figure(found["tokens_per_unit"]), "tokens per word or silence"),
        ("", f"{noise['wer']:.1%}" if noise else "", "word errors when read back"),
        ("", si(sum(found["rejects"].values())), "rejected"),
    ]
    cards = "".join(f'<li class="{c}"><b>{escape(v)}</b><span>{escape(n)}</span></li>' for c, v, n in numbers if v)
    total = max(1, tokens["text"] + tokens["speech"])
    share = "".join(
        f'<i class="{m}" style="flex:{tokens[m] / total:.4f}" title="{m}: {tokens[m] / total:.1%} of the tokens"></i>'
        for m in ("text", "speech")
        if tokens[m]
    )
    return f'<ul class="numbers">{cards}</ul><div class="share">{share}</div>'


_KEY = (
    '<p class="key"><span class="chip text">text</span> <span class="spoken"><span class="unit word"><span class="name">word'
    '</span><span class="ticks"><i></i><i></i><i></i></span></span><span class="unit silence"><span class="ticks"><i></i>'
    "</span></span></span> speech: one box per word, one mark per token, a silence has no box; point at a box for its ids.</p>"
)


def _sample(sample: Sample) -> str:
    runs = "".join(_text(run) if run.modality == "text" else _speech(run) for run in sample.runs)
    text = sample.text if len(sample.text) <= MAX_TEXT else sample.text[:MAX_TEXT] + " …"
    unknown = any(run.modality == "text" and not run.text for run in sample.runs)  # then the words stand only there
    original = (
        f'<details class="original"{" open" if unknown else ""}><summary>original text</summary><p>{escape(text)}</p></details>'
        if text
        else ""
    )
    return (
        f'<article class="sample"><h3>{escape(sample.id)}<small>{escape(sample.source)}</small></h3>'
        f'<div><div class="stitched">{runs}</div>{original}</div></article>'
    )


def _text(run: Run) -> str:
    shown = escape(run.text) if run.text else f"{run.num_tokens} text tokens"
    return f'<span class="run text" title="{run.num_tokens} text tokens">{shown}</span>'


def _speech(run: Run) -> str:
    names = [unit.text for unit in run.units if unit.text]
    says = []
    if run.text and run.text.split() != names:  # not told word by word, or spoken in another form than written
        says.append(f"<b>{escape(run.text)}</b>")
    if run.heard is not None and spoken_form(run.heard) != spoken_form(" ".join(names) or run.text):
        says.append(f"heard: {escape(run.heard or 'nothing')}")
    caption = f'<span class="says">{" · ".join(says)}</span>' if says else ""
    return f'<span class="spoken">{"".join(_unit(unit, bool(names)) for unit in run.units)}{caption}</span>'


def _unit(unit: Unit, named: bool) -> str:
    ids = " ".join(map(str, unit.ids_T))
    tip = escape(f"{unit.text or unit.kind}: {ids}")
    if named or unit.kind == "silence":
        marks = "".join(
            '<i class="piece"></i>' if t in unit.pieces else "<i></i>" for t in range(1, len(unit.ids_T) + 1)
        )
        name = f'<span class="name">{escape(unit.text)}</span>' if unit.text else ""
        inside = f'{name}<span class="ticks">{marks}</span>'
    else:
        inside = f'<span class="ids">{ids}</span>'
    return f'<span class="unit {unit.kind}" title="{tip}">{inside}</span>'


def histogram_svg(counts: Mapping[int, int], label: str, colour: str) -> str:
    """Bars of equal width over whole numbers; what lies above the 99th percentile is the last bar. A dashed line: median."""
    lengths = np.array(sorted(counts))
    times = np.array([counts[length] for length in lengths.tolist()])
    up_to = np.cumsum(times) / times.sum()
    low, high = int(lengths[0]), int(lengths[np.searchsorted(up_to, TAIL)])
    step = max(1, math.ceil((high - low + 1) / BARS))
    bar_N = np.minimum((lengths - low) // step, (high - low) // step)
    bars = np.bincount(bar_N, weights=times)
    width, height, left, right, top, bottom = 380, 170, 44, 8, 10, 26
    per = (width - left - right) / len(bars)
    unit = (height - top - bottom) / bars.max()
    out = [f'<svg class="histogram" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">']
    for share in (0.5, 1.0):
        y = height - bottom - share * bars.max() * unit
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if (share * bars.max()).is_integer():
            out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{si(share * bars.max())}</text>')
    for k, n in enumerate(bars.tolist()):
        start = low + k * step
        last = start + step - 1 if k + 1 < len(bars) else int(lengths[-1])
        tip = f"{start}" if last <= start else f"{start} to {last}"
        out.append(
            f'<g><title>{tip}: {n:.0f}</title><rect class="bar-{colour}" x="{left + k * per:.1f}" rx="1.5" '
            f'y="{height - bottom - n * unit:.1f}" width="{max(1.0, per - 1.5):.1f}" height="{n * unit:.1f}"/></g>'
        )
    median = int(lengths[np.searchsorted(up_to, 0.5)])
    x = left + ((median - low) // step + 0.5) * per
    out.append(f'<line class="median" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - bottom}"/>')
    tail = f"{si(high)}+" if lengths[-1] > high else si(high)
    labels = [(float(left), "start", si(low)), (float(width - right), "end", tail)]
    if left + 40 < x < width - right - 50:
        labels.append((x, "middle", si(median)))
    out += [f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{text}</text>' for x, anchor, text in labels]
    return "".join([*out, "</svg>"])


def _tables(found: Mapping[str, Any]) -> list[Table]:
    sources = [
        [name, f"{s['documents']}", f"{s['text_tokens']}", f"{s['speech_tokens']}", _share(s["ratio"])]
        for name, s in found["sources"].items()
    ]
    columns = ["source", "documents", "text tokens", "speech tokens", "words spoken"]
    note = "Words spoken: word ends in the speech against words of the original texts, of documents that hold both."
    tables = [Table(title="By source", columns=columns, rows=sources, note=note)]
    lengths = [
        [HISTOGRAMS[name][0], f"{of['mean']:.1f}", f"{of['p5']}", f"{of['p50']}", f"{of['p95']}", f"{of['most']}"]
        for name, of in found["lengths"].items()
        if of["n"]
    ]
    tables.append(Table(title="Lengths", columns=["", "mean", "5 %", "median", "95 %", "most"], rows=lengths))
    noise = [
        [kind, f"{of['wer']:.1%}", f"{of['low']:.1%} – {of['high']:.1%}", f"{of['spans']}", f"{of['words']}"]
        for kind, of in found["noise"].items()
    ]
    note = "A sample of the spoken spans, read back by the speech tokenizer's ASR head; its own errors are included."
    title, columns = "Noise by kind of text", ["kind", "WER", "95 % interval", "spans", "words"]
    tables.append(Table(title=title, columns=columns, rows=noise, note=note))
    for title, counts in (
        ("Rejected documents", found["rejects"]),
        ("Spans left as text", found["stage"].get("rejects") or {}),
        ("Words that cannot be spoken", found["stage"].get("unspeakable") or {}),
    ):
        rows = [[reason, f"{n}"] for reason, n in sorted(counts.items(), key=lambda item: -item[1])]
        tables.append(Table(title=title, columns=["reason", "count"], rows=rows))
    return [table for table in tables if table.rows]


def _facts(found: Mapping[str, Any]) -> str:
    made = found["info"]["made_by"]
    facts = {**{k: v for k, v in found["info"].items() if k != "made_by"}, **made}
    rows = "".join(f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
