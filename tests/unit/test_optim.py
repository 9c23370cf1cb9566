"""The schedule as a function of the step, and which parameters decay."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechquilt.train import optim


def lr_at(step, **changes):
    return optim.lr_at(step, **{"steps": 110, "lr": 1.0, "min_lr_ratio": 0.1, "warmup_steps": 10, **changes})


def test_schedule_values():
    assert lr_at(1) == pytest.approx(0.1)
    assert lr_at(5) == pytest.approx(0.5)
    assert lr_at(10) == pytest.approx(1.0)
    assert lr_at(60) == pytest.approx(0.55)  # half of the way down, on either curve
    assert lr_at(60, schedule="linear") == pytest.approx(0.55)
    assert lr_at(35, schedule="linear") == pytest.approx(0.775)
    assert lr_at(35) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)  # cos(pi / 4)
    assert lr_at(110) == pytest.approx(0.1)
    assert lr_at(1, warmup_steps=0) > 0.99


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    ratio=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "linear"]),
)
def test_schedule_rises_then_falls_to_its_floor(steps, warmup, ratio, schedule):
    warmup_steps = int(warmup * steps)
    rates = [
        optim.lr_at(s, steps=steps, lr=2.0, min_lr_ratio=ratio, warmup_steps=warmup_steps, schedule=schedule)
        for s in range(1, steps + 1)
    ]
    up, down = rates[:warmup_steps], rates[max(0, warmup_steps - 1) :]
    assert up == sorted(up)
    assert all(a >= b - 1e-12 for a, b in pairwise(down))
    assert max(rates) <= 2.0 + 1e-12
    if warmup_steps < steps:
        assert rates[-1] == pytest.approx(2.0 * ratio)


def adamw(model, **changes):
    fields = {"lr": 0.1, "weight_decay": 0.5, "beta1": 0.9, "beta2": 0.95, "device": torch.device("cpu")}
    return optim.adamw(model, **fields | changes)


def test_rates_by_the_beginning_of_a_name():
    model = nn.ModuleDict({"low": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "high": nn.Linear(2, 2)})
    optimizer = adamw(model, lr_scale={"low.": 0.1, "low.1.": 0.5})
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert rates == pytest.approx(
        {
            "low.0.weight": 0.01,
            "low.0.bias": 0.01,
            "low.1.weight": 0.05,
            "low.1.bias": 0.05,
            "high.weight": 0.1,
            "high.bias": 0.1,
        }
    )
    optim.set_lr(optimizer, 1.0)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [0.1, 0.5, 1.0]
    with pytest.raises(ValueError, match="'lower'"):
        adamw(model, lr_scale={"lower": 0.1})


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 3, 1))
    optimizer = adamw(model)
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decays == {
        "0.weight": 0.5,
        "2.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.bias": 0.0,
    }
    assert optim.parameter_names(optimizer) == list(decays)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    for n, p in model.named_parameters():  # lr * decay = 0.05
        assert torch.allclose(p, before[n] * (0.95 if decays[n] else 1.0))


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert optim.parameter_names(adamw(model)) == ["weight"]
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        adamw(model)


def test_gradients_are_divided_whatever_their_dtype():
    parameters = [nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)]
    for p in parameters[:2]:
        p.grad = torch.full_like(p, 6.0)
    optim.divide_gradients(parameters, torch.tensor(4.0, dtype=torch.float64))
    assert [None if p.grad is None else p.grad[0].item() for p in parameters] == [1.5, 1.5, None]


def test_the_latent_papers_schedule():
    """Spec 2, section 7: 4e-4 after 2,000 steps of warm-up, then a cosine to 0.01 of it at the last of 200,000."""

    def rate(step):
        return optim.lr_at(step, steps=200_000, lr=4e-4, min_lr_ratio=0.01, warmup_steps=2000, schedule="cosine")

    assert rate(1000) == pytest.approx(2e-4)
    assert rate(2000) == pytest.approx(4e-4)
    assert rate(101_000) == pytest.approx(4e-4 * (1 + 0.01) / 2)
    assert rate(200_000) == pytest.approx(4e-6)
