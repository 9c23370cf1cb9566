"""Spikes are found against the running median, named with their batch, skipped exactly, and the same after a resume."""

import json
import math
import statistics
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.train import checkpoint, guard
from speechquilt.train.guard import BadStep, BatchOutcome, StepGuard, StepOutcome
from speechquilt.train.metrics import read_metrics
from tests.e2e import tiny_training
from tests.e2e.test_resume import assert_same_run
from tests.e2e.tiny_training import objective


def outcome(step, loss, norm=1.0, weight=2.0, metas=("a",)):
    batches = [BatchOutcome(torch.tensor(loss * weight), torch.tensor(weight), meta) for meta in metas]
    return StepOutcome(step, torch.tensor(loss * weight), torch.tensor(weight), torch.tensor(norm), batches)


def spikes(losses, factor, read_every):
    """The steps at which a guard warns."""
    watching = StepGuard(factor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, loss in enumerate(losses):
            watching.note(outcome(step, loss))
            if step % read_every == 0:
                watching.check()
        watching.check()
    assert watching.spikes == len(caught)
    return [int(str(w.message).split()[1]) for w in caught]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 40.0, width=32), min_size=20, max_size=90), st.integers(1, 9))
def test_a_spike_is_what_exceeds_the_running_median(losses, read_every):
    """Whenever the numbers are read: at once, as on a CPU, or many steps later, as on a GPU."""
    expected = [
        i
        for i, loss in enumerate(losses)
        if i >= guard.FEWEST and loss > 4.0 * statistics.median(losses[max(0, i - guard.WINDOW) : i])
    ]
    assert spikes(losses, 4.0, read_every) == expected


def test_a_gradient_norm_may_spike_alone():
    watching = StepGuard(3.0)
    for step in range(20):
        watching.note(outcome(step, 2.0))
    assert not watching.check()
    watching.note(outcome(20, 2.0, norm=3.1, metas=("the culprit",)))
    with pytest.warns(UserWarning, match=r"step 20 is a spike: .*gradient norm 3.1 \(median 1\).*the culprit"):
        assert watching.check()


def test_the_state_survives_json():
    one, other = StepGuard(3.0), StepGuard(3.0)
    for step in range(30):
        one.note(outcome(step, 1.0 + step / 7))
    one.check()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    for watching in (one, other):
        watching.note(outcome(30, 14.0))
        with pytest.warns(UserWarning, match="step 30 is a spike"):
            assert watching.check()


@pytest.mark.parametrize(("loss", "norm", "weight"), [(math.nan, 1, 2), (1, math.inf, 2), (1, 1, 0)])
def test_unusable_steps(loss, norm, weight):
    watching = StepGuard(None)
    watching.note(outcome(1, 1.0))
    watching.note(outcome(2, loss, norm, weight))
    watching.note(outcome(3, math.nan))
    with pytest.raises(BadStep, match="step 2: "):
        watching.check()


# In a run

POISONED = 17


def poisoned(at, factor=1e3):
    """The objective, whose loss is `factor` times itself at the `at`-th call of this process."""
    calls = 0

    def spoilt(model, batch):
        nonlocal calls
        calls += 1
        loss, weight, scalars = objective(model, batch)
        return (loss * factor if calls == at else loss), weight, scalars

    return spoilt


def items_of(step):
    loader = tiny_training.ShuffledLoader()
    return str([loader.next_batch().meta["items"] for _ in range(step)][-1])


def test_a_poisoned_batch_is_named_and_counted(tmp_path):
    with pytest.warns(UserWarning, match=f"step {POISONED} is a spike") as caught:
        tiny_training.train(tmp_path, objective=poisoned(POISONED), spike_factor=20.0)
    (told,) = (str(w.message) for w in caught if "is a spike" in str(w.message))
    assert items_of(POISONED) in told
    counts = {line["step"]: line["spikes"] for line in read_metrics(tmp_path)}
    assert counts == {1: 0, 4: 0, 8: 0, 12: 0, 16: 0, 20: 1}


def test_without_a_factor_nothing_is_a_spike(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is a spike")
        tiny_training.train(tmp_path, objective=poisoned(POISONED))
    assert "spikes" not in read_metrics(tmp_path)[-1]


def part(run_dir, name):
    return checkpoint.load_tensors(checkpoint.latest(run_dir), name)


@pytest.mark.filterwarnings("ignore:.*is a spike")
def test_a_skipped_update_leaves_no_trace(tmp_path):
    """Weights and moments after the spike are those before it, whatever it was; the run goes on and may be resumed."""
    settings = {"spike_factor": 20.0, "skip_spikes": True}
    tiny_training.make(tmp_path / "before", **settings).train(stop_after=POISONED - 1)
    for name, factor in (("a", 1e3), ("b", 1e5)):
        tiny_training.make(tmp_path / name, objective=poisoned(POISONED, factor), **settings).train(stop_after=POISONED)
        for tensors in ("model", "optimizer"):
            before, after = part(tmp_path / "before", tensors), part(tmp_path / name, tensors)
            assert all(torch.equal(before[k], after[k]) for k in before if k != "seen")
    tiny_training.train(tmp_path / "a", **settings)
    tiny_training.train(tmp_path / "whole", objective=poisoned(POISONED), **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip_spikes": True}, "skip_spikes=true needs a spike_factor"),
        ({"spike_factor": 0.5}, "spike_factor=0.5 must be above 1"),
        ({"shard_size": 0}, "shard_size=0 must be positive"),
        ({"rank_timeout_s": 0}, "rank_timeout_s=0 must be positive"),
        ({"peak_flops": -1.0}, "peak_flops=-1.0 must be positive"),
    ],
)
def test_bad_values(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_training.make(tmp_path, **changes)
