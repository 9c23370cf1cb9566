"""Two gloo processes, each with half of the rows, train what one process trains with all of them."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechquilt.train import checkpoint, distributed
from speechquilt.train.metrics import read_metrics
from speechquilt.train.trainer import Stopped
from tests.e2e import tiny_training
from tests.e2e.test_resume import assert_same_run
from tests.e2e.tiny_training import ROOT, run_ranks, start_ranks


def on_rank_one(step: int, act):
    """The objective, but at one step rank 1 alone also does something."""
    calls = 0

    def objective(model, batch):
        nonlocal calls
        calls += 1
        loss, weight, scalars = tiny_training.objective(model, batch)
        return (act(loss) if calls == step and distributed.rank() == 1 else loss), weight, scalars

    return objective


def stop_me(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def worker(run_dir: Path) -> None:
    """What each of the two processes does: without dropout; with it, whole and in parts; with trouble on one rank."""
    tiny_training.train(run_dir / "plain", dropout=0.0)
    tiny_training.train(run_dir / "whole")
    tiny_training.make(run_dir / "parts").train(stop_after=7)
    tiny_training.train(run_dir / "parts")
    with pytest.raises(Stopped, match="after step 6"):
        tiny_training.train(run_dir / "stopped", objective=on_rank_one(6, stop_me))
    tiny_training.train(run_dir / "stopped")
    with pytest.raises(ValueError, match=r"step 3: loss nan.*highest loss first: rank 1: .*items"):  # on both ranks
        tiny_training.train(run_dir / "nan", objective=on_rank_one(3, lambda loss: loss * math.nan))
    distributed.stop()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("together")
    run_ranks("tests.e2e.test_two_processes", 2, run_dir)
    return run_dir


def test_two_processes_train_what_one_trains(together, tmp_path):
    tiny_training.train(tmp_path, dropout=0.0)
    one, two = (checkpoint.load_tensors(checkpoint.latest(d), "model") for d in (tmp_path, together / "plain"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=2e-6, atol=2e-7), name
    lines_one, lines_two = read_metrics(tmp_path), read_metrics(together / "plain")
    assert len(lines_one) == len(lines_two) == 6
    for a, b in zip(lines_one, lines_two):
        for key in ("step", "loss", "lr", "grad_norm", "one", "logit", "total_rows"):
            same = a[key] == b[key] if a[key] is None else a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6)
            assert same, (a["step"], key)


def test_each_rank_has_its_own_dropout_and_gets_it_back(together):
    rng = checkpoint.load_tensors(checkpoint.latest(together / "whole"), "rng")
    assert not torch.equal(rng["cpu.0"], rng["cpu.1"])
    assert_same_run(together / "whole", together / "parts")
    assert_same_run(together / "whole", together / "stopped")


def test_a_dead_rank_ends_the_job(tmp_path):
    """Under torchrun: which rank died of what, and a run folder from which the same command goes on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.e2e.tiny_training", str(tmp_path), "die_at=7"]
    ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    assert ended.returncode != 0
    assert re.search(r"Root Cause.*rank *: 1 .*\(SIGKILL\)", ended.stderr, re.DOTALL), ended.stderr
    assert checkpoint.latest(tmp_path).name == "step_00000005"


@pytest.mark.parametrize("trouble", ["die_at=7", "block_at=7"])
def test_the_others_say_that_a_rank_is_gone(tmp_path, trouble):
    survivor, lost = start_ranks("tests.e2e.tiny_training", 2, tmp_path, trouble, "rank_timeout_s=3", 'shard="full"')
    try:
        _, errors = survivor.communicate(timeout=60)
    finally:
        lost.kill()
    assert survivor.returncode not in (0, None)
    assert re.search(r"rank 0 got no answer from another rank.*run the same command again", errors, re.DOTALL), errors


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
