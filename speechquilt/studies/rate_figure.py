"""A figure of its own, without a style sheet: word error rate against bit rate, one point per frame rate.

The charts of the report take their colours from the report's style sheet; this one is a file that a README can show.
Bit rates double from point to point, so the x axis is logarithmic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 320, 62, 40, 24, 52
INK, GRID, POINT = "#333", "#ddd", "#b5472f"
HEADROOM = 1.15  # the y axis ends at this many times the highest point
LOWEST_TOP = 0.1  # per cent, where the y axis ends when all points are 0


@dataclass(frozen=True, kw_only=True)
class RatePoint:
    """One point of the figure."""

    frame_rate: float
    """Tokens per second."""
    bit_rate: float
    """Bits per second."""
    wer: float
    """Word error rate, as a share of words."""


def rate_svg(points: Sequence[RatePoint]) -> str:
    """A standalone SVG file's content. Raises ValueError without points."""
    if not points:
        raise ValueError("a figure needs at least one measured rate")
    points = sorted(points, key=lambda p: p.bit_rate)
    low, high = math.log2(points[0].bit_rate) - 0.5, math.log2(points[-1].bit_rate) + 0.5
    highest = max(LOWEST_TOP, 100 * HEADROOM * max(p.wer for p in points))
    step = _round_step(highest)
    top = step * math.ceil(highest / step)

    def at(point: RatePoint) -> tuple[float, float]:
        x = LEFT + (math.log2(point.bit_rate) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - point.wer * 100 / top) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" '
        f'fill="{INK}" role="img"><title>Word error rate against bit rate</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for i in range(round(top / step) + 1):
        y = TOP + (1 - i * step / top) * (HEIGHT - TOP - BOTTOM)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{i * step:g} %</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, points))
    out.append(f'<polyline points="{line}" fill="none" stroke="{POINT}" stroke-width="2"/>')
    for point in points:
        x, y = at(point)
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{POINT}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle" stroke="#fff" stroke-width="5" paint-order="stroke">'
            f"{point.frame_rate:g} Hz, {100 * point.wer:.1f} %</text>"
        )
        out.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{point.bit_rate:.0f}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">bits per second</text>')
    out.append(f'<text x="{LEFT - 8}" y="{TOP - 10}" text-anchor="end">WER</text></svg>')
    return "\n".join(out) + "\n"


def _round_step(top: float) -> float:
    """A round distance between about five grid lines up to `top` per cent."""
    raw = top / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
