"""A model small enough to be trained many times in a test, with what makes resuming hard: dropout, a buffer, epochs.

Run as a script it trains in a folder: `python -m tests.e2e.tiny_training RUN_DIR [key=value ...]`. With `block_at=N` the
objective writes RUN_DIR/blocked in the middle of step N and waits there to be killed; with `block_writing_at=N` it is the
checkpoint of step N, half written. With `die_at=N` it kills itself in step N. Of several ranks it is the last one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from speechquilt.train import checkpoint, distributed
from speechquilt.train.trainer import TrainConfig, Trainer, TrainResult

ROOT = Path(__file__).parents[2]
ITEMS, ROWS, WIDTH, CLASSES = 22, 4, 6, 5  # 22 items in rows of 4: the edge of an epoch falls inside a batch


@dataclass(frozen=True)
class Rows:
    x_BD: torch.Tensor
    y_B: torch.Tensor
    meta: dict = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Rows":
        return Rows(self.x_BD.to(device), self.y_B.to(device), self.meta)


class ShuffledLoader:
    """Rows r::world_size of a stream of epochs, each shuffled by its own seed. The state is a place in that stream."""

    def __init__(self, rows: int = ROWS) -> None:
        draw = torch.Generator().manual_seed(7)
        self.x = torch.randn(ITEMS, WIDTH, generator=draw)
        self.y = torch.randint(CLASSES, (ITEMS,), generator=draw)
        self.rows, self.next_item = rows, 0

    def next_batch(self) -> Rows:
        places = range(self.next_item, self.next_item + self.rows)[distributed.rank() :: distributed.world_size()]
        items = [self._order(i // ITEMS)[i % ITEMS] for i in places]
        self.next_item += self.rows
        return Rows(self.x[items], self.y[items], {"items": items})

    def state_dict(self) -> dict:
        return {"next_item": self.next_item}

    def load_state_dict(self, state: dict) -> None:
        self.next_item = state["next_item"]

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(ITEMS, generator=torch.Generator().manual_seed(epoch)).tolist()


class TinyModel(nn.Module):
    """Two layers; `seen` counts the forward passes in training, as a running statistic would."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Rows) -> torch.Tensor:
        self.seen += self.training
        return self.second(self.dropout(self.first(batch.x_BD).relu()))


def objective(model: nn.Module, batch: Rows):
    """Classification; class 0 stands for rows without a target, so weights differ between batches."""
    logits_BC = model(batch)
    labels_B = torch.where(batch.y_B == 0, -100, batch.y_B)
    loss = functional.cross_entropy(logits_BC, labels_B, ignore_index=-100, reduction="sum")
    one = batch.y_B == 1
    scalars = {
        "one": (logits_BC.detach()[:, 1] * one).sum(),
        "one_weight": one.sum(),
        "logit": logits_BC.detach().sum(),
        "total_rows": torch.tensor(len(batch.y_B)),
    }
    return loss, (labels_B != -100).sum(), scalars


CONFIG = {"steps": 20, "lr": 0.05, "warmup_steps": 3, "log_every": 4, "checkpoint_every": 5, "num_threads": 1}
RANK_TIMEOUT_S = 60  # so that ranks which wait for each other fail the test before pytest gives up


def make(run_dir: Path, objective=objective, rows: int = ROWS, dropout: float = 0.3, **changes) -> Trainer:
    config = TrainConfig(**{**CONFIG, "device": "cpu", "rank_timeout_s": RANK_TIMEOUT_S, **changes})
    return Trainer(config, TinyModel(dropout), objective, ShuffledLoader(rows), run_dir, "tiny")


def train(run_dir: Path, **changes) -> TrainResult:
    return make(run_dir, **changes).train()


def start_ranks(module: str, ranks: int, *arguments: object) -> list[subprocess.Popen]:
    """`python -m module arguments` in several gloo processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def run_ranks(module: str, ranks: int, *arguments: object) -> None:
    """The same, until all are done; fails when one of them does."""
    processes = start_ranks(module, ranks, *arguments)
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    told = "\n".join(f"rank {r}: {text}" for r, text in enumerate(errors))
    assert all(process.returncode == 0 for process in processes), told


def main(run_dir: Path, block_at: int = 0, block_writing_at: int = 0, die_at: int = 0, **changes) -> None:
    calls = 0

    def block() -> None:
        (run_dir / "blocked").touch()
        time.sleep(60)

    def blocking(model, batch):
        nonlocal calls
        calls += 1
        result = objective(model, batch)
        last_rank = distributed.rank() == distributed.world_size() - 1
        if calls == block_at and last_rank:
            block()
        if calls == die_at and last_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    class BlockingFile(checkpoint._HashingFile):
        def write(self, data):
            if f"step_{block_writing_at:08d}.tmp/optimizer" in str(self.raw.name):
                super().write(data[: len(data) // 2])
                self.flush()
                block()
            return super().write(data)

    checkpoint._HashingFile = BlockingFile
    train(run_dir, objective=blocking, **changes)
    distributed.stop()


if __name__ == "__main__":
    pairs = (argument.split("=") for argument in sys.argv[2:])
    main(Path(sys.argv[1]), **{key: json.loads(value) for key, value in pairs})
