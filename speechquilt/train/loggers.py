"""The lines of `metrics.jsonl` in TensorBoard, Weights & Biases or Trackio as well, for those who want to watch a run there.

Trap: `metrics.jsonl` stays the record. A killed run that goes on repeats the steps since its last checkpoint: TensorBoard
drops the old ones, the services keep what they were sent first.
"""

import importlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

LoggerName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "speechquilt"  # of the services
ID_FILE = "logger_id"  # in a run folder: the name by which a service knows this run again


class Loggers:
    """The chosen ones, each imported only when it is named. Raises ImportError naming a package that is missing."""

    def __init__(self, names: Sequence[LoggerName], run_dir: Path, step: int, title: str) -> None:
        self._board: Any = None
        self._services: list[Any] = []
        for name in names:
            if name == "tensorboard":
                board = _import(name, "torch.utils.tensorboard")
                self._board = board.SummaryWriter(log_dir=str(run_dir / name), purge_step=step + 1)
                continue
            service, id_ = _import(name, name), _id_of(run_dir)
            known = {"id": id_, "name": title, "dir": str(run_dir)} if name == "wandb" else {"name": f"{title}-{id_}"}
            service.init(project=PROJECT, resume="allow", **known)
            self._services.append(service)

    def write(self, line: dict[str, Any]) -> None:
        """The numbers of one line of metrics; what was not counted is left out, and so are words."""
        step = line["step"]
        values = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        for service in self._services:
            service.log(values, step=step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        for service in self._services:
            service.finish()


def _import(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"loggers={name}: {name} is not installed; pip install {name}, or leave it out") from error


def _id_of(run_dir: Path) -> str:
    path = run_dir / ID_FILE
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
