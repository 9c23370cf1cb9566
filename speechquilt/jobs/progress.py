"""The progress line of a bulk job: items done of all, work per second, time left, and after a minute what all of it will be.

Trap: an item may be large (a slice of a corpus), so a worker may tell a part of one: 0.25 of an item and what was in it.
"""

import time

from tqdm import tqdm

LOOK_EVERY_S = 0.5
FORECAST_AFTER_S = 60.0


class Progress:
    """Items done of `total`, `done` of them by earlier runs; `unit` is what the amount of work is counted in."""

    def __init__(self, name: str, unit: str, *, total: int, done: int) -> None:
        self.unit, self.total, self.before = unit, total, done
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="item",
            desc=name,
            mininterval=LOOK_EVERY_S,
            bar_format="{l_bar}{bar}| {n:.10g}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )
        self.begin, self.items, self.amount = time.monotonic(), 0.0, 0.0
        self.forecast_at = self.begin + FORECAST_AFTER_S

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, items: float, amount: float) -> None:
        self.show(self.items + items, self.amount + amount)

    def show(self, items: float, amount: float) -> None:
        """All that was done since the start of this run."""
        self.items, self.amount = items, amount
        now = time.monotonic()
        seconds = max(1e-3, now - self.begin)
        self.bar.set_postfix_str(f"{amount / seconds:.3g} {self.unit} per s", refresh=False)
        self.bar.update(round(self.before + items, 2) - self.bar.n)
        if 0 < items < self.total - self.before and now >= self.forecast_at:
            self.forecast_at = float("inf")  # once is enough; the line itself goes on
            self.bar.write(forecast(items, amount, seconds, self.total - self.before, self.unit))


def forecast(items: float, amount: float, seconds: float, items_in_all: int, unit: str) -> str:
    """What this run will have made and taken when it ends, if what is left is like what is done."""
    scale = items_in_all / items
    hours, minutes = divmod(round(seconds * scale / 60), 60)
    return (
        f"expected in all: {amount * scale:.3g} {unit} in {hours} h {minutes:02d} min "
        f"(from {amount:.3g} {unit} in the first {seconds:.0f} s)"
    )
