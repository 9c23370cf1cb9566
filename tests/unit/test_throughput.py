"""Rates are what was done between two lines over the seconds between them, over all ranks."""

import time

import pytest
import torch

from speechquilt.train import throughput
from speechquilt.train.metrics import TIMING, read_metrics
from tests.e2e import tiny_training
from tests.e2e.tiny_training import objective


def test_rates_are_of_the_window(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = throughput.Clock(seconds=10.0, step=5, totals={"total_units": 50.0}, peak=1000.0)
    for step, passed, units, expected in ((9, 2.0, 90.0, 20.0), (10, 0.5, 100.0, 20.0), (20, 5.0, 150.0, 10.0)):
        now += passed
        rates = clock.rates(step, {"total_units": units, "total_flops": units * 4})
        assert rates["units_per_s"] == pytest.approx(expected)
        assert "tokens_per_s" not in rates
    assert rates["rate"] == pytest.approx(2.0)
    assert rates["mfu"] == pytest.approx(4 * 50 / 5 / 1000)
    assert clock.seconds == pytest.approx(17.5)


def with_totals(model, batch):
    loss, weight, scalars = objective(model, batch)
    counts = {"total_tokens": 30, "total_units": 10, "total_flops": 6e6}
    return loss, weight, scalars | {name: torch.tensor(count) for name, count in counts.items()}


def test_a_run_says_how_fast_it_is(tmp_path):
    """Also after a resume, where the totals do not begin at 0."""
    settings = {"objective": with_totals, "peak_flops": 1e9, "log_every": 1}
    tiny_training.make(tmp_path, **settings).train(stop_after=7)
    tiny_training.train(tmp_path, **settings)
    for line in read_metrics(tmp_path):
        assert line["tokens_per_s"] == pytest.approx(30 * line["rate"], rel=1e-6)
        assert line["units_per_s"] == pytest.approx(10 * line["rate"], rel=1e-6)
        assert line["mfu"] == pytest.approx(6e6 * line["rate"] / 1e9, rel=1e-6)
        assert set(TIMING) <= line.keys()


def test_no_peak_no_mfu(tmp_path):
    tiny_training.train(tmp_path, objective=with_totals)
    assert "mfu" not in read_metrics(tmp_path)[-1]
    assert throughput.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Toy", None)],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.peak_flops(torch.device("cuda")) == peak
