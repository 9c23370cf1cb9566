"""Sharded over two or four gloo processes, a model trains what one process trains; and any number of them goes on from it.

Run as a script under several ranks it is what those ranks do: `python -m tests.e2e.test_fsdp JOB RUN_DIR`.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import StaticPatcher
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.train import checkpoint, distributed
from speechquilt.train.metrics import read_metrics
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import IGNORE, Batch
from tests.dummies import VOCAB, make_batch, random_laid_out
from tests.e2e.test_resume import assert_same_run
from tests.e2e.tiny_training import run_ranks

ROWS, STEPS = 4, 6
LLAMA = LlamaConfig(width=24, num_layers=2, num_heads=2, num_kv_heads=1, ffn_width=18)
MODELS: dict[str, PlainLMConfig | LatentLMConfig] = {
    "plain": PlainLMConfig(vocab_size=VOCAB.size, llama=LLAMA),
    "latent": LatentLMConfig(
        vocab_size=VOCAB.size,
        num_text=VOCAB.num_text,
        global_=LLAMA,
        local_width=12,
        encoder_layers=1,
        decoder_layers=2,
        local_heads=2,
        local_ffn=10,
        text_path="bypass",
    ),
}


class RandomRows:
    """Rows r::world_size of global batches of random documents, of other lengths and weights in each row."""

    def __init__(self) -> None:
        self.made = 0

    def next_batch(self) -> Batch:
        rows = [
            [random_laid_out(1000 * self.made + 10 * row + n, 2 + row % 3) for n in range(1 + row % 2)]
            for row in range(ROWS)
        ]
        self.made += 1
        batch = make_batch(rows, StaticPatcher(2))
        ours = slice(distributed.rank(), None, distributed.world_size())
        axes = ("ids_BT", "labels_BT", "doc_BT", "opens_BT", "closes_BT")
        return replace(batch, **{axis: getattr(batch, axis)[ours] for axis in axes}, meta={"made": self.made})

    def state_dict(self) -> dict:
        return {"made": self.made}

    def load_state_dict(self, state: dict) -> None:
        self.made = state["made"]


def next_token(model, batch):
    logits_BTV, labels_BT = model(batch), batch.labels_BT
    loss = functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
    return loss, (labels_BT != IGNORE).sum(), {"total_tokens": (batch.ids_BT != VOCAB.pad).sum()}


def make(run_dir: Path, kind: str, **changes) -> Trainer:
    settings = {"steps": STEPS, "lr": 0.01, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 3, "device": "cpu"}
    config = TrainConfig(**{**settings, "num_threads": 1, "accumulate": 2, "clip": 0.5, **changes})
    model = MODELS[kind].build(distributed.rank())  # other weights on every rank: those of rank 0 count
    return Trainer(config, model, next_token, RandomRows(), run_dir)


def train(run_dir: Path, kind: str, stop_after: int | None = None, **changes) -> Trainer:
    trainer = make(run_dir, kind, **changes)
    trainer.train(stop_after)
    return trainer


# What the ranks do


def two_ranks(run_dir: Path) -> None:
    for kind in MODELS:
        trainer = train(run_dir / kind, kind, shard="full")
        assert all(isinstance(p, DTensor) for p in trainer.parameters)
        assert sum(p.to_local().numel() for p in trainer.parameters) < 0.6 * sum(p.numel() for p in trainer.parameters)
    train(run_dir / "parts", "latent", stop_after=4, shard="full", checkpoint_async=True)
    train(run_dir / "parts", "latent", shard="full", checkpoint_async=True)
    train(run_dir / "half", "latent", stop_after=3, shard="full")
    train(run_dir / "from one", "latent", shard="full")
    train(run_dir / "unsharded", "latent", stop_after=3)
    train(run_dir / "unsharded", "latent", shard="full", recompute="selective")
    train(run_dir / "bfloat16", "latent", shard="full", dtype="bfloat16", recompute="blocks")


def four_ranks(run_dir: Path) -> None:
    with pytest.raises(ValueError, match="shard_size=3 must divide the number of ranks, 4"):
        make(run_dir / "refused", "plain", shard="hybrid", shard_size=3)
    train(run_dir / "hybrid", "latent", shard="hybrid", shard_size=2)
    train(run_dir / "from two", "latent", shard="full")


# What must be true of it


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process: both models, and one that stopped half way."""
    run_dir = tmp_path_factory.mktemp("alone")
    for kind in MODELS:
        train(run_dir / kind, kind)
    train(run_dir / "half", "latent", stop_after=3)
    return run_dir


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("two")
    shutil.copytree(alone / "half", run_dir / "from one")
    run_ranks("tests.e2e.test_fsdp", 2, "two_ranks", run_dir)
    return run_dir


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "half", run_dir / "from two")
    run_ranks("tests.e2e.test_fsdp", 4, "four_ranks", run_dir)
    return run_dir


def assert_equal_runs(a: Path, b: Path, loss: float = 1e-5, weights: float = 2e-5) -> None:
    """Losses and gradient norms of every step, and the last weights, up to the order of additions."""
    lines_a, lines_b = read_metrics(a), read_metrics(b)
    assert [line["step"] for line in lines_a] == [line["step"] for line in lines_b] == list(range(1, STEPS + 1))
    for line_a, line_b in zip(lines_a, lines_b):
        assert line_a["total_tokens"] == line_b["total_tokens"]
        for key in ("loss", "grad_norm"):
            assert line_a[key] == pytest.approx(line_b[key], rel=loss), (line_a["step"], key)
    left, right = (checkpoint.load_tensors(checkpoint.latest(d), "model") for d in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=weights), name


@pytest.mark.parametrize("kind", MODELS)
def test_two_sharded_processes_train_what_one_trains(alone, two, kind):
    assert_equal_runs(alone / kind, two / kind)


def test_two_replicas_of_two_shards_train_what_one_trains(alone, four):
    assert_equal_runs(alone / "latent", four / "hybrid")


def test_sharded_and_stopped_the_same_bits(two):
    assert_same_run(two / "latent", two / "parts")


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_one_process_goes_on_from_two(alone, two, tmp_path, recompute):
    shutil.copytree(two / "half", tmp_path / "run")
    train(tmp_path / "run", "latent", recompute=recompute)
    assert_equal_runs(alone / "latent", tmp_path / "run")


def test_four_go_on_from_two(alone, four):
    assert_equal_runs(alone / "latent", four / "from two")


@pytest.mark.parametrize("name", ["from one", "unsharded"])
def test_whole_weights_are_sharded_on_loading(alone, two, name):
    assert_equal_runs(alone / "latent", two / name)


def test_bfloat16_stays_near(alone, two):
    lines, exact = read_metrics(two / "bfloat16"), read_metrics(alone / "latent")
    assert [x["loss"] for x in lines] == pytest.approx([x["loss"] for x in exact], rel=0.03)
    assert {x.dtype for x in checkpoint.load_tensors(checkpoint.latest(two / "bfloat16"), "model").values()} == {
        torch.float32
    }


def test_a_whole_model_reads_the_shards(two):
    model = MODELS["latent"].build(1)
    assert checkpoint.load_model(two / "latent", model) == STEPS
    whole = checkpoint.load_tensors(checkpoint.latest(two / "latent"), "model")
    assert all(torch.equal(x, whole[name]) for name, x in model.state_dict().items())
    files = checkpoint.load_state(checkpoint.latest(two / "latent"))["files"]
    assert {name.split("-")[0] + name.split("-")[1] for name in files if name.startswith("model")} == {
        "model/shard00001",
        "model/shard00002",
    }


if __name__ == "__main__":
    {"two_ranks": two_ranks, "four_ranks": four_ranks}[sys.argv[1]](Path(sys.argv[2]))
    distributed.stop()
