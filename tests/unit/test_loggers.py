"""Every logger is shown the lines of metrics.jsonl, is imported only when it is named, and goes on with its run."""

import sys
from types import SimpleNamespace

import pytest

from speechquilt.train.metrics import MetricsFile, read_metrics
from tests.e2e.tiny_training import make


class Service:
    """Stands in for wandb and trackio: keeps what it was told."""

    def __init__(self) -> None:
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **known) -> None:
        self.runs.append(known)

    def log(self, values, step) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


class Board:
    """Stands in for torch.utils.tensorboard."""

    def __init__(self) -> None:
        self.opened, self.scalars, self.closed = [], [], 0

    def SummaryWriter(self, **known) -> "Board":
        self.opened.append(known)
        return self

    def add_scalar(self, name, value, step) -> None:
        self.scalars.append((step, name, value))

    def close(self) -> None:
        self.closed += 1


def in_two_parts(run_dir, **options) -> list[dict]:
    """A run that stops after step 4 and goes on -> its lines."""
    make(run_dir, steps=8, log_every=4, **options).train(stop_after=4)
    make(run_dir, steps=8, log_every=4, **options).train()
    return read_metrics(run_dir)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_is_told_every_line_and_knows_the_run_again(tmp_path, monkeypatch, name):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    lines = in_two_parts(tmp_path / "a", loggers=(name,))
    expected = [(line["step"], {k: v for k, v in line.items() if k != "step" and v is not None}) for line in lines]
    assert service.logged == expected
    assert [step for step, _ in expected] == [1, 4, 8]
    assert service.runs[0] == service.runs[1]
    assert service.runs[0]["resume"] == "allow"
    assert service.finished == 2
    make(tmp_path / "b", steps=8, loggers=(name,)).train(stop_after=1)
    key = "id" if name == "wandb" else "name"
    assert service.runs[2][key] != service.runs[0][key]  # another folder is another run


def test_tensorboard_drops_what_a_resumed_run_does_again(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    lines = in_two_parts(tmp_path, loggers=("tensorboard",))
    assert [(step, value) for step, name, value in board.scalars if name == "loss"] == [
        (line["step"], line["loss"]) for line in lines
    ]
    assert [known["purge_step"] for known in board.opened] == [1, 5]
    assert {known["log_dir"] for known in board.opened} == {str(tmp_path / "tensorboard")}
    assert board.closed == 2


def test_loggers_may_change_in_a_resumed_run_and_compute_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Service())
    make(tmp_path / "a", steps=8, log_every=4).train(stop_after=4)
    make(tmp_path / "a", steps=8, log_every=4, loggers=("wandb",)).train()
    make(tmp_path / "b", steps=8, log_every=4).train()
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        make(tmp_path, loggers=(name,)).train()


def test_other_ranks_and_unnamed_loggers_import_nothing(tmp_path, monkeypatch):
    for module in ("wandb", "trackio", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace())  # any use is an AttributeError
    with MetricsFile(tmp_path, 0, writes=False, loggers=("wandb", "trackio", "tensorboard")) as file:
        file.write({"step": 1})
    with MetricsFile(tmp_path, 0) as file:
        file.write({"step": 1})
