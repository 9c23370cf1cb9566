"""The charts of all pages, drawn by matplotlib as inline SVG in one style.

Trap: matplotlib knows no CSS variables. Every colour is drawn as a stand-in of its own and becomes `var(--name)` of
templates/colours.css in the SVG, so that a chart follows the reader's light or dark theme. A colour that is no name of
`COLOURS` cannot be drawn. Texts are never read as TeX: a `$` in a corpus is a dollar.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from speechquilt.config import nearest
from speechquilt.evals.measures import si
from speechquilt.types import AlignedWord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RUNS = tuple(f"run-{k}" for k in range(6))
COLOURS = ("ink", "muted", "line", "panel", "text", "text-soft", "speech", "speech-soft", "good", *RUNS)
DASHES = ("solid", (0, (7, 3)), (0, (2, 2)), (0, (9, 2, 2, 2)), (0, (4, 2)), (0, (1, 1.5)))  # told apart without colour
MARKERS = ("o", "s", "D", "^", "v", "P")
MAX_POINTS = 240  # a curve is averaged down to this many
SKIP = 0.1  # the steep first part of a curve may leave the picture at the top
BARS = 32  # of a histogram, at most
TAIL = 0.99  # share of all that has bars of its own; the rest is the last bar
WIDTH = 360.0  # of most charts, in pixels: that of a phone, so that 12 pixels of text stay readable there
TOKEN_WIDTH = 27.0  # of one speech token, in pixels


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training run: at each of N logged points the steps, global units and FLOPs so far, and the two losses in nats.
    A loss is NaN where it was not measured."""

    name: str
    steps: Sequence[float]
    units: Sequence[float]
    flops: Sequence[float]
    speech_loss: Sequence[float]
    text_loss: Sequence[float]

    def __post_init__(self) -> None:
        lengths = {k: len(v) for k, v in vars(self).items() if k != "name"}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"curve {self.name!r}: {lengths} points; every axis needs the same number")


@dataclass(frozen=True, kw_only=True)
class UtteranceView:
    """One spoken sentence: log-mel `mel_MF` (mel bands by frames, over the whole duration), word times, the speech
    tokens `ids_T`, and for each way of patching, by name, its `opens_T`."""

    mel_MF: np.ndarray
    duration_s: float
    words: Sequence[AlignedWord]
    ids_T: Sequence[int]
    frame_rate: float  # tokens per second
    patchings: dict[str, Sequence[bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, opens_T in self.patchings.items():
            if len(opens_T) != len(self.ids_T):
                raise ValueError(f"patching {name!r}: {len(opens_T)} opens for {len(self.ids_T)} tokens")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A share (or a difference of shares) with its interval, in the row and of the series named."""

    row: str
    series: str
    value: float
    low: float
    high: float
    chance: float | None = None


def require() -> None:
    """Raises ImportError naming the extra when there is no matplotlib; for work that takes long before it draws."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("charts need matplotlib; pip install speechquilt[report]") from error


def colour(name: str) -> str:
    """The stand-in of a colour, `#0a0b` and its number. Raises ValueError with the nearest names."""
    if name not in COLOURS:
        raise ValueError(f"unknown colour {name!r}; {nearest(name, COLOURS)}")
    return f"#0a0b{COLOURS.index(name):02x}"


_STAND_INS = {colour(name): name for name in COLOURS}


@contextmanager
def drawing(width: float, height: float) -> "Iterator[Figure]":
    """A figure of so many pixels in the style of all charts; what is drawn on it must be made into SVG inside."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "speechquilt", "text.parse_math": False, "font.size": 12,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "text.color": colour("muted"), "axes.labelcolor": colour("muted"), "axes.edgecolor": colour("line"),
        "xtick.color": colour("muted"), "ytick.color": colour("muted"), "xtick.major.size": 0, "ytick.major.size": 0,
        "axes.grid": True, "grid.color": colour("line"), "axes.axisbelow": True, "axes.unicode_minus": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.spines.bottom": False,
        "legend.frameon": False, "legend.fontsize": 12, "image.composite_image": False,
    }  # fmt: skip
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # only the width of a text is measured with this font
        yield Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)


def axes(figure: "Figure", left: float, right: float, top: float, bottom: float, **options: Any) -> "Axes":
    """Axes with margins in pixels."""
    width, height = 72 * figure.get_size_inches()
    place = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    ax = figure.add_axes(place, **options)
    ax.patch.set_visible(False)
    return ax


def svg(figure: "Figure", label: str, *, shrink: float = 0.0, standalone: bool = False) -> Markup:
    """The figure as SVG: inline, in the colours of the page around it, or `standalone` as a file with its own.

    Inline it is as wide as its place (`.chart` in style.css), or no wider than drawn, and no narrower than `shrink` of that.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = out.getvalue()
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 : drawn.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<[^>]*>", _restyled, body).replace("<g/>", "")
    body = re.sub(r"\s*\n\s*", "\n", body)
    width, height = (f"{72 * side:.4g}" for side in figure.get_size_inches())
    box = f'viewBox="0 0 {width} {height}" role="img" aria-label="{Markup.escape(label)}"'
    if not standalone:
        limits = f' style="max-width: {width}px; min-width: {shrink * float(width):.0f}px"' if shrink else ""
        return Markup(f'<svg class="chart"{limits} {box}>{body}</svg>')
    style = f"{colours_css()} * {{ stroke-linejoin: round; }}"
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif"><title>{Markup.escape(label)}</title>'
        f'<style>{style}</style><rect width="{width}" height="{height}" rx="8" style="fill: var(--panel)"/>{body}</svg>\n'
    )


def _restyled(tag: re.Match[str]) -> str:
    """One tag as a page wants it; texts are not touched, they may say anything."""
    if tip := re.fullmatch(r'<g id="tip:([^"]*)">', tag[0]):
        return f"<g><title>{tip[1]}</title>"
    found = re.sub("|".join(_STAND_INS), lambda m: f"var(--{_STAND_INS[m[0]]})", tag[0])
    found = re.sub(r'^<g id="[^"]*"', "<g", found).replace("xlink:href", "href")
    return re.sub(r"font-family: [^;\"]*(; )?", "", re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", found))


def colours_css() -> str:
    return resources.files("speechquilt.reports").joinpath("templates/colours.css").read_text(encoding="utf-8")


def line_chart(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_label: str) -> Markup:
    """Lines of (name, x, y) over a linear x axis from 0, each ending in its last value; "" when nothing was measured. The
    y axis holds every line from `SKIP` of its way on, so that the ends can be told apart."""
    thinned = [(k, name, *_thinned(x, y)) for k, (name, x, y) in enumerate(lines)]
    thinned = [line for line in thinned if len(line[2])]
    if not thinned:
        return Markup("")
    width, height, top, bottom = WIDTH, 270, 8, 40
    shown = np.concatenate([y[x >= SKIP * x[-1]] for _, _, x, y in thinned])
    x_max = max(float(x[-1]) for _, _, x, _ in thinned) or 1.0
    span = max(float(np.ptp(shown)), 1e-3 * abs(float(shown.max())), 1e-6)
    y_low, y_high = float(shown.min()) - 0.06 * span, float(shown.max()) + 0.06 * span
    with drawing(width, height) as figure:
        ax = axes(figure, left=44, right=50, top=top, bottom=bottom, xlim=(0, x_max), ylim=(y_low, y_high))
        ax.grid(axis="x", visible=False)
        ax.locator_params(axis="x", nbins=4)
        ax.xaxis.set_major_formatter(lambda value, _: si(value))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        ax.set_xlabel(x_label)
        for k, name, x, y in thinned:
            ax.plot(x, y, color=colour(RUNS[k % len(RUNS)]), linestyle=DASHES[k % len(DASHES)], linewidth=2, label=name)
        inside = height - top - bottom
        wanted = [
            (x[-1] / x_max * (width - 94), (y_high - y[-1]) / (y_high - y_low) * inside) for _, _, x, y in thinned
        ]
        for (k, _, x, y), down in zip(thinned, _spread(wanted, low=4, high=inside - 4)):
            ax.annotate(
                f"{y[-1]:.2f}", (x[-1], 1 - down / inside), xycoords=("data", "axes fraction"), xytext=(5, 0),
                textcoords="offset points", va="center", color=colour(RUNS[k % len(RUNS)]), annotation_clip=False,
            )  # fmt: skip
        ax.legend(loc="upper right", handlelength=3.2)
        return svg(figure, f"{x_label}: " + ", ".join(f"{name} ends at {y[-1]:.2f}" for _, name, _, y in thinned))


def interval_chart(points: Sequence[Point], label: str, paints: Sequence[str] = RUNS) -> Markup:
    """Rows of points with their 95 % intervals in percent; a tick marks chance, or a line 0 where differences are drawn.
    `paints`: the colours of the series, in turn."""
    if not points:
        return Markup("")
    rows, series = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("row", "series"))
    gap, per = 24, 15  # between rows for their label, and per point
    tall = gap + per * len(series)
    columns = 2 if max(map(len, series)) <= 24 else 1
    legend = 20 * math.ceil(len(series) / columns) + 4 if len(series) > 1 else 0
    height = legend + tall * len(rows) + 24
    signed = min(p.low for p in points) < 0
    with drawing(WIDTH, height) as figure:
        ax = axes(figure, left=14, right=22, top=legend, bottom=24)
        ax.set(xlim=(-105 if signed else -2, 102), ylim=(tall * len(rows), 0), yticks=[])
        ax.grid(axis="y", visible=False)
        ax.set_xticks(range(-100, 101, 50) if signed else range(0, 101, 25))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        for r, row in enumerate(rows):
            ax.text(ax.get_xlim()[0] + 2, r * tall + 14, row, color=colour("ink"), fontsize=12.5, va="center")
        if signed:
            ax.axvline(0, color=colour("muted"), linewidth=1)
        for p in points:
            k = series.index(p.series)
            y, paint = rows.index(p.row) * tall + gap + per * (k + 0.4), colour(paints[k % len(paints)])
            ax.plot([100 * p.low, 100 * p.high], [y, y], color=paint, linewidth=3, alpha=0.45, solid_capstyle="round")
            (dot,) = ax.plot(100 * p.value, y, MARKERS[k % len(MARKERS)], color=paint, markersize=7)
            dot.set_gid(f"tip:{p.row}, {p.series}: {100 * p.value:.1f} % [{100 * p.low:.0f}, {100 * p.high:.0f}]")
            if p.chance is not None:
                ax.plot([100 * p.chance] * 2, [y - per / 2, y + per / 2], color=colour("ink"), linewidth=1)
        if legend:
            marks = [
                ax.plot([], [], MARKERS[k % len(MARKERS)], color=colour(paints[k % len(paints)]), markersize=7)[0]
                for k in range(len(series))
            ]
            figure.legend(
                marks, series, loc="upper left", ncols=columns, borderpad=0.1, handletextpad=0.2, columnspacing=1.5
            )
        return svg(figure, label)


def utterance_chart(view: UtteranceView) -> Markup:
    """Words, spectrogram, speech tokens and patches of one utterance on one time axis."""
    num_tokens = len(view.ids_T)
    per_second = TOKEN_WIDTH * view.frame_rate
    width = max(num_tokens * TOKEN_WIDTH, view.duration_s * per_second) + 2
    box, mel_height, gap = 24, 150, 26
    height = 22 + box + 6 + mel_height + 20 + (1 + len(view.patchings)) * (box + gap)
    with drawing(width, height) as figure:
        ax = figure.add_axes((0, 0, 1, 1), xlim=(-1, width - 1), ylim=(height, 0))
        ax.axis("off")

        def row(label: str, y: float) -> None:
            ax.text(0, y - 8, label, color=colour("ink"), va="center", fontweight="bold")

        row("words", 20)
        for word in view.words:
            start, length = word.start_s * per_second, max(2.0, (word.end_s - word.start_s) * per_second)
            _box(ax, start, 20, length, box, word.text, "text", "text-soft")
        top = 20 + box + 6
        end = view.duration_s * per_second
        _spectrogram(ax, view.mel_MF, (0, end, top + mel_height, top))
        ax.set(xlim=(-1, width - 1), ylim=(height, 0))
        for border in sorted({t for word in view.words for t in (word.start_s, word.end_s)}):
            ax.plot([border * per_second] * 2, [top, top + mel_height], color="white", alpha=0.55, lw=1, ls=(0, (3, 3)))
        y = top + mel_height
        for tick in np.arange(0, view.duration_s, 0.5 if view.duration_s > 1 else 0.1):
            ax.text(tick * per_second, y + 10, f"{tick:.3g} s", va="center")
        y += 20 + gap - 8
        row(f"speech tokens, {view.frame_rate:.4g} per second", y)
        for t, i in enumerate(view.ids_T):
            _box(ax, t * TOKEN_WIDTH, y, TOKEN_WIDTH, box, str(i), "speech", "speech-soft")
        for name, opens_T in view.patchings.items():
            y += box + gap
            starts = [t for t, opens in enumerate(opens_T) if opens]
            row(f"{name}: {len(starts)} patches, {num_tokens / max(1, len(starts)):.2f} tokens each", y)
            for start, stop in zip(starts, [*starts[1:], num_tokens]):
                _box(ax, start * TOKEN_WIDTH, y, (stop - start) * TOKEN_WIDTH, box - 4, str(stop - start), "speech")
        return svg(figure, "words, spectrogram, speech tokens and patches of one utterance", shrink=0.85)


def _spectrogram(ax: "Axes", mel_MF: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """A log-mel with low bands at the bottom, its contrast from the 5th to the 99.7th percentile."""
    mel_MF = np.nan_to_num(np.asarray(mel_MF, dtype=np.float64))
    low, high = np.percentile(mel_MF, [5, 99.7])
    level_MF = np.clip((mel_MF - low) / max(high - low, 1e-9), 0, 1)
    ax.imshow(level_MF[::-1], cmap="inferno", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="none")


def _box(
    ax: "Axes", x: float, y: float, width: float, height: float, text: str, edge: str, fill: str = "panel"
) -> None:
    """A labelled box; the label shrinks to fit, and is left to the tooltip when it would be unreadable."""
    from matplotlib.patches import Rectangle

    size = min(11.5, (width - 3) / max(1, len(text)) / 0.58)
    place = (x + 0.5, y), max(1.0, width - 1.5), height
    ax.add_patch(Rectangle(*place, facecolor=colour(fill), edgecolor=colour(edge), linewidth=1, gid=f"tip:{text}"))
    if size >= 6.5:
        ax.text(x + width / 2, y + height / 2, text, size=size, ha="center", va="center", color=colour(edge))


def histogram(counts: Mapping[int, int], label: str, paint: str) -> Markup:
    """Bars of equal width over whole numbers; what lies above the 99th percentile is the last bar. A dashed line: median."""
    low, step, bars, high, median = binned(counts)
    last = max(counts)
    with drawing(WIDTH, 180) as figure:
        ax = axes(figure, left=46, right=10, top=10, bottom=26, xlim=(0, len(bars)), ylim=(0, 1.04 * float(bars.max())))
        ax.grid(axis="x", visible=False)
        ax.locator_params(axis="y", nbins=3, integer=True)
        ax.yaxis.set_major_formatter(lambda value, _: si(value))
        for k, (n, drawn) in enumerate(
            zip(bars.tolist(), ax.bar(np.arange(len(bars)) + 0.5, bars, 0.86, color=colour(paint)))
        ):
            start, stop = low + k * step, low + (k + 1) * step - 1 if k + 1 < len(bars) else last
            drawn.set_gid(f"tip:{start if stop <= start else f'{start} to {stop}'}: {n:.0f}")
        at = (median - low) // step + 0.5
        ax.axvline(at, color=colour("ink"), linestyle=(0, (3, 3)), linewidth=1)
        ticks = {0.0: (si(low), "left"), float(len(bars)): (si(high) + ("+" if last > high else ""), "right")}
        if 0.12 * len(bars) < at < 0.85 * len(bars):
            ticks[at] = (si(median), "center")
        ax.set_xticks(list(ticks), [text for text, _ in ticks.values()])
        for tick, (_, side) in zip(ax.get_xticklabels(), ticks.values()):
            tick.set(horizontalalignment=side)
        return svg(figure, label)


def binned(counts: Mapping[int, int]) -> tuple[int, int, np.ndarray, int, int]:
    """(lowest length, lengths per bar, bars, highest length with a bar of its own, median)."""
    lengths = np.array(sorted(counts))
    times = np.array([counts[length] for length in lengths.tolist()])
    up_to = np.cumsum(times) / times.sum()
    low, high = int(lengths[0]), int(lengths[np.searchsorted(up_to, TAIL)])
    step = max(1, math.ceil((high - low + 1) / BARS))
    bar_N = np.minimum((lengths - low) // step, (high - low) // step)
    return low, step, np.bincount(bar_N, weights=times), high, int(lengths[np.searchsorted(up_to, 0.5)])


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Finite points only, averaged in equal groups down to `MAX_POINTS`."""
    x_N, y_N = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.isfinite(x_N) & np.isfinite(y_N)
    x_N, y_N = x_N[keep], y_N[keep]
    if len(x_N) <= MAX_POINTS:
        return x_N, y_N
    groups = np.arange(len(x_N)) * MAX_POINTS // len(x_N)
    count = np.bincount(groups)
    return np.bincount(groups, x_N) / count, np.bincount(groups, y_N) / count


def _spread(
    wanted: Sequence[tuple[float, float]], low: float, high: float, gap: float = 13, near: float = 40
) -> list[float]:
    """Heights for the labels at (x, y): near the wanted ones, those less than `near` apart in x at least `gap` apart."""
    placed: dict[int, float] = {}
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):
        below = [y for k, y in placed.items() if abs(wanted[k][0] - wanted[i][0]) < near]
        placed[i] = max([wanted[i][1], *(y + gap for y in below)])
    done: list[int] = []
    for i in sorted(placed, key=lambda i: -placed[i]):  # push back up what fell out at the bottom
        under = [placed[k] for k in done if abs(wanted[k][0] - wanted[i][0]) < near]
        placed[i] = max(low, min([placed[i], high, *(y - gap for y in under)]))
        done.append(i)
    return [placed[i] for i in range(len(wanted))]
