"""The progress line of bulk jobs: parts of items add up, and the forecast scales what was seen to all that is left."""

import pytest

from speechquilt.jobs import progress
from speechquilt.jobs.progress import Progress, forecast


def test_the_forecast_is_of_this_run():
    """2.5 of 10 items took two minutes; four times as much is eight minutes."""
    line = forecast(2.5, 1e6, 120.0, 10, "tokens")
    assert "4e+06 tokens in 0 h 08 min" in line
    assert "first 120 s" in line
    assert "in 2 h 00 min" in forecast(1, 5.0, 60.0, 120, "s audio")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_it_is_told_once_after_the_first_minute(clock, capsys):
    with Progress("job", "tokens", total=10, done=4) as line:
        for now, items in ((30.0, 0.5), (59.0, 0.9), (61.0, 1.0), (200.0, 2.0)):
            clock[0] = now
            line.show(items, 100.0 * items)
            out = capsys.readouterr().out
            assert out.count("expected in all: 600 tokens") == out.count("expected") == (now == 61.0)  # six are left
    assert line.bar.n == 6  # 4 of an earlier run


def test_nothing_done_is_no_ground_for_a_forecast(clock, capsys):
    with Progress("job", "tokens", total=10, done=0) as line:
        clock[0] = 100.0
        line.show(0.0, 0.0)
        assert "expected" not in capsys.readouterr().out
        line.add(1.0, 50.0)
        assert "500 tokens in 0 h 17 min" in capsys.readouterr().out


def test_shares_of_items_add_up_to_whole_ones(capsys):
    with Progress("job", "tokens", total=3, done=0) as line:
        for _ in range(30):
            line.add(0.1, 1.0)
        assert line.bar.n == pytest.approx(3)
    assert "3/3" in capsys.readouterr().err
