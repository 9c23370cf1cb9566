"""A figure of its own for a README: word error rate against bit rate, one point per frame rate.

Bit rates double from point to point, so the x axis is logarithmic.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from speechquilt.reports.charts import axes, colour, drawing, svg

WIDTH, HEIGHT = 480, 320
HEADROOM = 1.2  # the y axis ends at this many times the highest point
LOWEST_TOP = 0.1  # per cent, where the y axis ends when all points are 0
APART = 2**0.5  # the x axis goes on this far, as a factor, beyond the outermost points


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
    bits, errors = [p.bit_rate for p in points], [100 * p.wer for p in points]
    with drawing(WIDTH, HEIGHT) as figure:
        ax = axes(figure, left=62, right=30, top=30, bottom=52, xscale="log")
        ax.set(xlim=(bits[0] / APART, bits[-1] * APART), ylim=(0, max(LOWEST_TOP, HEADROOM * max(errors))))
        ax.grid(axis="x", visible=False)
        ax.set_xticks(bits, [f"{rate:.0f}" for rate in bits])
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        ax.set_xlabel("bits per second", labelpad=8)
        ax.set_title("word error rate", loc="left", fontsize=12)
        ax.plot(bits, errors, color=colour("speech"), linewidth=2)
        ax.plot(bits, errors, "o", color=colour("speech"), markersize=8, gid="points")
        for point in points:
            ax.annotate(
                f"{point.frame_rate:g} Hz, {100 * point.wer:.1f} %", (point.bit_rate, 100 * point.wer), xytext=(0, 10),
                textcoords="offset points", ha="center", color=colour("ink"),
                bbox={"facecolor": colour("panel"), "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        return svg(figure, "Word error rate against bit rate", standalone=True)
