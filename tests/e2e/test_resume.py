"""Killed in the middle of a step, or stopped, or damaged, and run again: the same bits as a run that was left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speechquilt.train import checkpoint
from speechquilt.train.metrics import TIMING, read_metrics
from tests.e2e import tiny_training

ROOT = Path(__file__).parents[2]


def everything(run_dir):
    """All tensors of the last checkpoint, and what of its state does not tell the time."""
    folder = checkpoint.latest(run_dir)
    tensors = {
        f"{name}/{k}": v
        for name in ("model", "optimizer", "rng")
        for k, v in checkpoint.load_tensors(folder, name).items()
    }
    state = checkpoint.load_state(folder)
    return tensors, {k: state[k] for k in ("step", "loader", "sums", "scalars")}


def lines(run_dir):
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(run_dir)]


def assert_same_run(a, b):
    (tensors_a, state_a), (tensors_b, state_b) = everything(a), everything(b)
    assert tensors_a.keys() == tensors_b.keys()
    assert [k for k in tensors_a if not torch.equal(tensors_a[k], tensors_b[k])] == []
    assert state_a == state_b
    assert lines(a) == lines(b)


def kill(run_dir, *when):
    """Train in another process until it has blocked itself, then kill it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.tiny_training", str(run_dir), *when],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (run_dir / "blocked").exists():
        assert process.poll() is None, "the run ended before its step"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 20 steps that was left alone: nearly four epochs, dropout, a running buffer."""
    run_dir = tmp_path_factory.mktemp("whole")
    tiny_training.train(run_dir)
    return run_dir


def test_sigkill_in_the_middle_of_a_step(whole, tmp_path):
    """Step 13 is past a metrics line (12) that the last checkpoint (10) does not know, and past two epoch edges."""
    kill(tmp_path, "block_at=13")
    assert checkpoint.latest(tmp_path).name == "step_00000010"
    assert read_metrics(tmp_path)[-1]["step"] == 12
    tiny_training.train(tmp_path)
    assert_same_run(whole, tmp_path)


def test_sigkill_before_the_first_checkpoint(whole, tmp_path):
    kill(tmp_path, "block_at=3")
    assert checkpoint.latest(tmp_path) is None
    tiny_training.train(tmp_path)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("background", ["true", "false"])
def test_sigkill_while_a_checkpoint_is_written(whole, tmp_path, background):
    """The optimizer's file is half on disk; in the background training has gone on meanwhile."""
    kill(tmp_path, "block_writing_at=10", f"checkpoint_async={background}")
    assert checkpoint.latest(tmp_path).name == "step_00000005"
    assert (tmp_path / checkpoint.FOLDER / "step_00000010.tmp" / "model").is_dir()
    tiny_training.train(tmp_path)
    assert_same_run(whole, tmp_path)


def test_saving_in_the_background_changes_nothing(whole, tmp_path):
    tiny_training.make(tmp_path, checkpoint_async=True, checkpoint_every=2).train(stop_after=9)
    tiny_training.train(tmp_path, checkpoint_async=True, checkpoint_every=1)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("stops", [[1], [7, 8], [5, 11, 19], [20, 20]])
def test_stopped_anywhere(whole, tmp_path, stops):
    for stop in stops:
        result = tiny_training.make(tmp_path).train(stop_after=stop)
        assert result.steps == stop
    assert tiny_training.train(tmp_path).steps == 20
    assert_same_run(whole, tmp_path)


def test_one_trainer_may_go_on(whole, tmp_path):
    trainer = tiny_training.make(tmp_path)
    trainer.train(stop_after=9)
    trainer.train()
    assert_same_run(whole, tmp_path)


def test_truncated_checkpoint_and_half_a_line(whole, tmp_path):
    tiny_training.make(tmp_path).train(stop_after=18)
    (bad,) = (checkpoint.latest(tmp_path) / "optimizer").iterdir()
    bad.write_bytes(bad.read_bytes()[:100])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 17, "lo')
    with pytest.warns(UserWarning, match=r"optimizer/shard-.* has 100 bytes"):
        tiny_training.train(tmp_path)
    assert_same_run(whole, tmp_path)


def test_saving_more_often_changes_nothing(whole, tmp_path):
    tiny_training.make(tmp_path, checkpoint_every=3, keep_checkpoints=1).train(stop_after=10)
    tiny_training.train(tmp_path)
    assert_same_run(whole, tmp_path)


def test_seconds_count_all_training(tmp_path):
    first = tiny_training.make(tmp_path).train(stop_after=10)
    second = tiny_training.train(tmp_path)
    assert second.seconds > first.seconds > 0
    seconds = [line["seconds"] for line in read_metrics(tmp_path)]
    assert seconds == sorted(seconds)
