"""The report's pictures, as inline SVG and PNG made here: line charts, one utterance in detail, interval bars, icons.

Place in the pipeline: `report.write_report` calls them; nothing else does.
Trap: colours are CSS variables of report.css (`--text`, `--speech`, `--run-0` ...), never values, so that a picture
follows the reader's light or dark theme and text and speech look the same everywhere.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from speechquilt.types import AlignedWord

NUM_RUN_STYLES = 6  # --run-0 .. --run-5 in report.css
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")  # runs stay apart without colour vision
MAX_POINTS = 240  # a curve is averaged down to this many
SKIP = 0.1  # the steep first part of a curve may leave the picture at the top


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
class Score:
    """A table cell: an accuracy with its interval, drawn against chance."""

    value: float
    low: float
    high: float
    chance: float = 0.0


def si(x: float) -> str:
    """1234567 -> "1.2 M"; three figures at most."""
    for limit, unit in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{unit}"
    return f"{x:.3g}"


def run_style(index: int) -> str:
    """SVG attributes of the index-th run's line, the same in every chart and in the legend."""
    dash = DASHES[index % len(DASHES)]
    return f'style="stroke:var(--run-{index % NUM_RUN_STYLES})"' + (f' stroke-dasharray="{dash}"' if dash else "")


def line_chart(lines: Sequence[tuple[int, Sequence[float], Sequence[float]]], x_label: str) -> str:
    """Lines of (run style, x, y) over a linear x axis from 0, each ending in its last value. The y axis holds every line
    from `SKIP` of its way on, so that the ends can be told apart."""
    thinned = [(style, *_thinned(x, y)) for style, x, y in lines]
    thinned = [(style, x, y) for style, x, y in thinned if len(x)]
    if not thinned:
        return '<p class="empty">nothing was measured</p>'
    width, height, left, right, top, bottom = 460, 270, 40, 48, 10, 42
    x_max = max(float(x[-1]) for _, x, _ in thinned) or 1.0
    shown = [y[x >= SKIP * x[-1]] for _, x, y in thinned]
    y_ticks = _ticks(min(float(y.min()) for y in shown), max(float(y.max()) for y in shown))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def px(x: np.ndarray | float) -> np.ndarray:
        return left + np.asarray(x) / x_max * (width - left - right)

    def py(y: np.ndarray | float) -> np.ndarray:
        return top + (y_high - np.asarray(y)) / (y_high - y_low) * (height - top - bottom)

    clip = f"clip{zlib.crc32(repr((x_label, x_max, y_ticks)).encode())}"  # equal ids are equal rectangles
    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    out.append(f'<clipPath id="{clip}"><rect x="{left}" y="{top}" width="{width - left - right}" ')
    out.append(f'height="{height - top - bottom + 2}"/></clipPath>')
    for tick in y_ticks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(f'<text x="{left - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in (t for t in _ticks(0, x_max, 4) if t <= x_max * 1.001):
        out.append(f'<text x="{px(tick):.1f}" y="{height - bottom + 17}" text-anchor="middle">{si(tick)}</text>')
    middle = (left + width - right) / 2
    out.append(f'<text class="axis" x="{middle}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    for style, x, y in thinned:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px(x), py(y)))
        out.append(f'<polyline clip-path="url(#{clip})" points="{points}" {run_style(style)}/>')
    ends = _spread([(float(px(x[-1])), float(py(y[-1]))) for _, x, y in thinned], low=top, high=height - bottom)
    for (style, x, y), at in zip(thinned, ends):
        colour = f'style="fill:var(--run-{style % NUM_RUN_STYLES})"'
        out.append(f'<text class="end" x="{px(x[-1]) + 5:.1f}" y="{at + 4:.1f}" {colour}>{y[-1]:.2f}</text>')
    return "".join([*out, "</svg>"])


def utterance_svg(view: UtteranceView) -> str:
    """Words, spectrogram, speech tokens and patches of one utterance on one time axis."""
    token_px, mel_height, box, gap = 27.0, 150, 24, 34
    per_second = token_px * view.frame_rate
    width = max(len(view.ids_T) * token_px, view.duration_s * per_second) + 2
    out: list[str] = []

    def row(label: str, y: float) -> None:
        out.append(f'<text class="label" x="1" y="{y - 6:.1f}">{escape(label)}</text>')

    y = 20.0
    row("words", y)
    for word in view.words:
        x, w = word.start_s * per_second + 1, max(2.0, (word.end_s - word.start_s) * per_second)
        out.append(_box("text", x, y, w, box, word.text))
    y += box + 8
    image = data_uri("image/png", mel_png(view.mel_MF))
    mel_width = view.duration_s * per_second
    out.append(f'<image href="{image}" x="1" y="{y}" width="{mel_width:.1f}" height="{mel_height}" ')
    out.append('preserveAspectRatio="none"/>')
    for border in sorted({t for word in view.words for t in (word.start_s, word.end_s)}):
        x = border * per_second + 1
        out.append(f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + mel_height}"/>')
    y += mel_height + 16
    for tick in _ticks(0, view.duration_s, 8):
        if tick <= view.duration_s:
            out.append(f'<text x="{tick * per_second + 1:.1f}" y="{y:.1f}">{tick:.4g} s</text>')
    y += gap
    row(f"speech tokens, {view.frame_rate:.4g} per second", y)
    for t, i in enumerate(view.ids_T):
        out.append(_box("speech", t * token_px + 1, y, token_px, box, str(i)))
    for name, opens_T in view.patchings.items():
        y += box + gap - 8
        starts = [t for t, opens in enumerate(opens_T) if opens]
        row(f"{name}: {len(starts)} patches, {len(view.ids_T) / max(1, len(starts)):.2f} tokens each", y)
        for start, end in zip(starts, [*starts[1:], len(view.ids_T)]):
            out.append(_box("patch", start * token_px + 2, y, (end - start) * token_px - 2, box - 4, str(end - start)))
    height = y + box + 4
    head = f'<svg class="utterance" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">'
    return "".join([head, *out, "</svg>"])


def score_svg(score: Score) -> str:
    """A bar from 0 to 100 %: the interval, the value, and chance as a tick; solid when clear of chance."""

    def x(share: float) -> str:
        return f"{2 + 96 * min(1.0, max(0.0, share)):.1f}"

    span = 96 * max(0.01, score.high - score.low)
    clear = "clear" if score.low > score.chance else "unclear"
    return (
        f'<svg class="score {clear}" viewBox="0 0 100 12" aria-hidden="true"><line class="track" x1="2" x2="98" y1="6" '
        f'y2="6"/><rect x="{x(score.low)}" y="3.5" width="{span:.1f}" height="5" rx="2.5"/>'
        f'<circle cx="{x(score.value)}" cy="6" r="4"/>'
        f'<line class="chance" x1="{x(score.chance)}" x2="{x(score.chance)}" y1="0" y2="12"/></svg>'
    )


_WAVE = "".join(
    f'<line class="s" x1="{{x{k}}}" x2="{{x{k}}}" y1="{16 - h}" y2="{16 + h}"/>' for k, h in enumerate((4, 9, 12, 6, 3))
)


def _wave(left: int) -> str:
    return _WAVE.format(**{f"x{k}": left + 4 * k for k in range(5)})


def _tokens(left: int, classes: str = "sss") -> str:
    return "".join(
        f'<rect class="{c}f" x="{left + 9 * k}" y="12" width="7" height="8" rx="1.5"/>' for k, c in enumerate(classes)
    )


_ARROW = '<path class="n" d="M27 16h8m-3-3l3 3l-3 3"/>'
ICONS: dict[str, str] = {
    "world": '<circle class="n" cx="32" cy="16" r="12"/><path class="n" d="M20 16h24M32 4c-7 7-7 17 0 24c7-7 7-17 0-24"/>'
    '<circle class="tf" cx="26" cy="11" r="3"/><circle class="sf" cx="38" cy="20" r="3"/>',
    "tokenizer": _wave(5) + _ARROW + _tokens(38),
    "text_to_token": '<text class="t" x="0" y="20.5">abc</text>' + _ARROW + _tokens(38),
    "shards": '<rect class="n" x="14" y="5" width="36" height="22" rx="2"/><path class="n" d="M14 12h36M14 19.5h36M26 5v22"/>'
    '<rect class="tf" x="29" y="14" width="9" height="4"/><rect class="sf" x="38" y="14" width="9" height="4"/>'
    '<rect class="sf" x="29" y="21.5" width="18" height="4"/><rect class="tf" x="29" y="7" width="18" height="3.5"/>',
    "pretrain": '<path class="n" d="M12 4v24h42"/><path class="s" d="M16 7c4 13 16 16 36 17"/>'
    '<path class="t" d="M16 5c3 8 14 11 36 12"/>',
    "evals": '<path class="t" d="M15 9l3 3l6-7"/><path class="n" d="M29 9h22M29 22h22"/><path class="s" d="M15 22l3 3l6-7"/>',
    "report": '<rect class="n" x="19" y="3" width="26" height="26" rx="2"/><path class="s" d="M26 24v-8"/>'
    '<path class="t" d="M32 24v-14"/><path class="s" d="M38 24v-5"/>',
    "decoder": _tokens(3) + _ARROW + _wave(40),
    "chat": '<path class="t" d="M8 5h24v12h-16l-5 4v-4h-3z"/><path class="s" d="M56 12h-24v12h16l5 4v-4h3z"/>',
}


def stage_icon(name: str) -> str:
    """The picture of one stage. Raises ValueError naming the known ones."""
    if name not in ICONS:
        raise ValueError(f"unknown icon {name!r}; known icons: {', '.join(ICONS)}")
    return f'<svg class="icon" viewBox="0 0 64 32" aria-hidden="true">{ICONS[name]}</svg>'


def mel_png(mel_MF: np.ndarray) -> bytes:
    """A log-mel as a palette PNG, low bands at the bottom, contrast from the 5th to the 99.7th percentile."""
    mel_MF = np.nan_to_num(np.asarray(mel_MF, dtype=np.float64))
    low, high = np.percentile(mel_MF, [5, 99.7])
    level_MF = np.clip((mel_MF - low) / max(high - low, 1e-9), 0, 1)
    return _palette_png(np.round(level_MF[::-1] * 255).astype(np.uint8), _INK)


def data_uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _gradient(anchors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """256 RGB colours through the anchors."""
    at = np.linspace(0, 255, len(anchors))
    return np.stack([np.interp(np.arange(256), at, [a[c] for a in anchors]) for c in range(3)], 1).astype(np.uint8)


_INK = _gradient([(14, 12, 28), (58, 20, 66), (138, 38, 62), (206, 84, 32), (246, 158, 60), (255, 236, 190)])


def _palette_png(index_HW: np.ndarray, palette_N3: np.ndarray) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = index_HW.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), index_HW], axis=1).tobytes()  # filter 0 before each line
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette_N3.tobytes()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def _box(kind: str, x: float, y: float, w: float, h: float, text: str) -> str:
    """A labelled box; the label shrinks to fit, and is left to the tooltip when it would be unreadable."""
    size = min(11.5, (w - 3) / max(1, len(text)) / 0.58)
    label = ""
    if size >= 6.5:
        label = f'<text x="{x + w / 2:.1f}" y="{y + h / 2 + size * 0.36:.1f}" style="font-size:{size:.1f}px">{escape(text)}</text>'
    return (
        f'<g class="{kind}"><title>{escape(text)}</title><rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, w - 1.5):.1f}" '
        f'height="{h}" rx="4"/>{label}</g>'
    )


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


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _spread(
    wanted: Sequence[tuple[float, float]], low: float, high: float, gap: float = 13, near: float = 40
) -> list[float]:
    """Heights for the labels at (x, y): near the wanted ones, those less than `near` apart in x at least `gap` apart."""
    placed: dict[int, float] = {}
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):
        below = [y for k, y in placed.items() if abs(wanted[k][0] - wanted[i][0]) < near]
        placed[i] = max([wanted[i][1], *(y + gap for y in below)])
    for i in sorted(placed, key=lambda i: -placed[i]):  # push back up what fell out at the bottom
        above = [placed[k] for k in placed if placed[k] > placed[i] and abs(wanted[k][0] - wanted[i][0]) < near]
        placed[i] = max(low, min([placed[i], high, *(y - gap for y in above)]))
    return [placed[i] for i in range(len(wanted))]
