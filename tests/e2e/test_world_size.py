"""A run saved by two ranks goes on with one and with four: the same rows of the same global batches, the same model.

Each rank notes what it was given in `RUN_DIR/rows-N-R.jsonl` (N ranks, rank R), one line per batch.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.train import checkpoint, distributed
from speechquilt.train.metrics import read_metrics
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import Batch
from tests.dummies import VOCAB, random_document
from tests.e2e.tiny_training import run_ranks

SAVED_AT, STEPS, ACCUMULATE = 3, 6, 2
TRAIN = TrainConfig(steps=STEPS, lr=1e-2, accumulate=ACCUMULATE, log_every=1, device="cpu", num_threads=1)


class Noting:
    """A packed loader that writes down what it gives to this rank."""

    def __init__(self, loader: PackedLoader, run_dir: Path) -> None:
        self.loader = loader
        self.file = run_dir / f"rows-{distributed.world_size()}-{distributed.rank()}.jsonl"

    def next_batch(self) -> Batch:
        batch = self.loader.next_batch()
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest() for row in batch.ids_BT]
        with self.file.open("a") as file:
            file.write(json.dumps(list(zip(batch.meta["document_ids"], rows))) + "\n")
        return batch

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state)


def train(run_dir: Path, stop_after: int | None = None) -> None:
    """A curriculum over two sources, each gone through several times."""
    run_dir.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    data = {name: [random_document(rng, num_segments=6) for _ in range(15)] for name in "ab"}
    config = PackConfig(rows=4, units_per_row=64, tokens_per_row=128, buffer=6)
    loader = config.build(
        Mixture(data, {"a": 1.0, "b": 2.0}, seed=5),
        VOCAB,
        PatcherConfig(kind="curriculum", tau1=0.0, tau2=1.0).build(),
        seed=5,
        total_batches=STEPS * ACCUMULATE,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    llama = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_width=32)
    model = PlainLMConfig(vocab_size=VOCAB.size, llama=llama).build(seed=0)
    Trainer(TRAIN, model, NextTokenObjective(VOCAB), Noting(loader, run_dir), run_dir).train(stop_after)


def global_rows(run_dir: Path, world_size: int) -> list[list]:
    """Of every batch that these ranks made: its rows in the order of the global batch."""
    files = [run_dir / f"rows-{world_size}-{rank}.jsonl" for rank in range(world_size)]
    by_rank = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [[row for together in zip(*shares) for row in together] for shares in zip(*by_rank)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process from the first step to the last."""
    run_dir = tmp_path_factory.mktemp("alone")
    train(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two ranks up to the checkpoint."""
    run_dir = tmp_path_factory.mktemp("saved")
    run_ranks("tests.e2e.test_world_size", 2, run_dir, SAVED_AT)
    return run_dir


def test_two_ranks_read_what_one_reads(alone, saved):
    assert global_rows(saved, 2) == global_rows(alone, 1)[: SAVED_AT * ACCUMULATE]


@pytest.mark.parametrize("world_size", [1, 4])
def test_another_number_of_ranks_goes_on(alone, saved, tmp_path, world_size):
    run_dir = tmp_path / "run"
    shutil.copytree(saved, run_dir)
    run_ranks("tests.e2e.test_world_size", world_size, run_dir, STEPS)
    assert global_rows(run_dir, world_size) == global_rows(alone, 1)[SAVED_AT * ACCUMULATE :]
    ours, theirs = (checkpoint.load_tensors(checkpoint.latest(d), "model") for d in (run_dir, alone))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    last, wanted = read_metrics(run_dir)[-1], read_metrics(alone)[-1]
    assert last["step"] == STEPS
    for key in ("total_tokens", "total_epochs_a", "total_epochs_b"):
        assert last[key] == pytest.approx(wanted[key])
    assert last["total_epochs_a"] > 1


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
    distributed.stop()
