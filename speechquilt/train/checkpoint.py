"""Checkpoints: the whole state of a run as safetensors and JSON, complete or not there at all.

They are written through PyTorch's distributed checkpoints (DCP). One layout for one rank and for many, sharded or not:
each rank writes the shards it holds, and whoever reads puts together what it needs, whatever the number of ranks was
(docs/decisions/0009-distributed-checkpoints.md).
Trap: a folder is a checkpoint only when its `state.json`, written last, agrees with the size and hash of every other
file. Anything else (a kill, a full disk, a bad copy) is passed over for the checkpoint before it.

    run_dir/checkpoints/step_00001000/model/shard-*.safetensors       state_dict with buffers
                                      optimizer/shard-*.safetensors   "exp_avg.<parameter>" and so on
                                      rng/shard-*.safetensors         torch's generators, uint8, one per rank
                                      state.json                      step, config, loader, sums, seconds, files
"""

import errno
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from speechquilt.train import distributed
from speechquilt.train.optim import parameter_names

FOLDER = "checkpoints"
STATE = "state.json"
LAYOUT = 2  # 1 had one file each for model, optimizer and generators
Tensors = dict[str, torch.Tensor]

# One rank alone, or each for itself, is what we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Writer:
    """Writes a run's checkpoints, one at a time, all ranks together; in the `background` when asked.

    `save` copies the tensors to the CPU and returns; training goes on while a thread writes them. The one before is
    finished first, so an error in the background is raised by the next `save` or by `wait`. Every rank calls `save` and
    `wait` at the same places. The last `keep` checkpoints stay.
    """

    def __init__(
        self, run_dir: Path, *, keep: int, background: bool, device: torch.device, timeout_s: float = 600.0
    ) -> None:
        self.run_dir, self.keep, self.background = run_dir, keep, background
        self._stager = BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")  # pinned, so the copy is fast
        self._group = distributed.new_cpu_group(timeout_s)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Nothing is left in flight. After an error that one is raised, not what became of the checkpoint."""
        if kind is None:
            self.wait()
        elif self._pending is not None:
            self._pending.exception()
            self._pending = None

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """`tensors`: part -> named tensors, `state`: plain JSON data. What is whole on every rank, rank 0 writes.

        Raises OSError when this checkpoint, or in the background the one before, cannot be written; those that were
        there before stay as they are.
        """
        self.wait()
        staged = self._stager.stage({part: _ours(part, named) for part, named in tensors.items()})
        self._pending = self._thread.submit(_write, self.run_dir, step, staged, state, self.keep, self._group)
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in flight is on disk. Raises OSError when it cannot be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def latest(run_dir: Path, *, together: bool = False) -> Path | None:
    """The newest usable checkpoint of a run, or None. Warns about each newer one that is not usable.

    `together`: all ranks ask, each reads a share of the files, and all get the same answer.
    """
    folders = folders_of(run_dir)
    if together:
        folders = distributed.broadcast_object(folders)
    ranks = distributed.world_size() if together else 1
    for folder in reversed(folders):
        problem = _problem(folder, share=slice(distributed.rank() if together else 0, None, ranks))
        if together:
            problem = next((p for p in distributed.gather_objects(problem) if p), None)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is passed over: {problem}; the checkpoint before it is used", stacklevel=2)
    return None


def folders_of(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, unfinished ones left out; whether they are usable is not looked at."""
    return sorted(p for p in (run_dir / FOLDER).glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def load_tensors(folder: Path, part: str) -> Tensors:
    """Every tensor of a part, whole, whatever ranks wrote it."""
    saved = _metadata(folder, part)
    tensors = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in saved.items()}
    _fill(folder, part, tensors)
    return tensors


def load_model(path: Path, model: nn.Module) -> int:
    """Load the weights of a run folder (its newest checkpoint) or of one checkpoint folder; returns the step.

    A sharded model reads its own shards only. Raises FileNotFoundError when there is none, ValueError when they belong
    to another model.
    """
    folder = path if (path / STATE).is_file() else latest(path)
    if folder is None:
        raise FileNotFoundError(f"{path} holds no usable checkpoint; train first, or check the path of the run")
    tensors = model.state_dict()
    saved = {name: tuple(info.size) for name, info in _metadata(folder, "model").items()}
    wanted = {name: tuple(x.shape) for name, x in tensors.items()}
    if saved != wanted:
        raise ValueError(
            f"{folder} holds the weights of another model than this {type(model).__name__} "
            f"({_difference(saved, wanted)}); build the model with the run's own config, or choose another run_dir"
        )
    _fill(folder, "model", tensors)
    return load_state(folder)["step"]


def load_generators(folder: Path, names: list[str]) -> Tensors:
    """Those of the named generators' states that the checkpoint has."""
    saved = _metadata(folder, "rng")
    tensors = {name: torch.empty(saved[name].size, dtype=torch.uint8) for name in names if name in saved}
    _fill(folder, "rng", tensors)
    return tensors


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Its state as tensors named `<moment>.<parameter>`. Rates and decay are not state: the config decides them."""
    names = parameter_names(optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{key}.{names[i]}": value for i, entry in state.items() for key, value in entry.items()}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """The inverse of `pack_optimizer`, from a checkpoint; sharded like the parameters of `optimizer`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index = {name: i for i, name in enumerate(parameter_names(optimizer))}
    tensors: Tensors = {}
    state: dict[int, Tensors] = {}
    for full_name, info in _metadata(folder, "optimizer").items():
        key, _, name = full_name.partition(".")
        if name not in index:
            raise ValueError(f"{folder} has a moment of {name!r}, which is not trained here; train the same parameters")
        like = parameters[index[name]]
        whole = key == "step"  # a number per parameter, not split
        tensors[full_name] = torch.zeros(info.size, device=like.device) if whole else torch.zeros_like(like)
        state.setdefault(index[name], {})[key] = tensors[full_name]
    _fill(folder, "optimizer", tensors)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# Writing, in the thread


def _ours(part: str, named: Tensors) -> Tensors:
    """What this rank hands in: its shards, its generators, and on rank 0 what is whole everywhere."""
    return {k: x for k, x in named.items() if distributed.rank() == 0 or part == "rng" or isinstance(x, DTensor)}


def _write(
    run_dir: Path,
    step: int,
    staged: dict[str, Tensors],
    state: dict[str, Any],
    keep: int,
    group: dist.ProcessGroup | None,
) -> None:
    """All ranks' shards, then `state.json`, then the rename that makes the folder a checkpoint, then drop old ones."""
    folder = run_dir / FOLDER / f"step_{step:08d}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        _on_first_rank(lambda: _make_empty(temporary), group)
        ours: dict[str, dict[str, Any]] = {}
        for part, named in staged.items():
            writer = _HashingWriter(temporary / part)
            dcp.save(named, storage_writer=writer, process_group=group, no_dist=group is None)
            ours |= writer.facts
        files = {
            name: facts for facts_of in distributed.gather_objects(ours, group) for name, facts in facts_of.items()
        }
        document = {"layout": LAYOUT, "step": step, **state, "files": dict(sorted(files.items()))}
        _on_first_rank(lambda: _complete(temporary, folder, document), group)
    except (OSError, SafetensorError, CheckpointException) as error:
        cause = _cause(error)
        if distributed.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(getattr(cause, "errno", None) or errno.EIO, _not_written(folder, cause)) from error
    if distributed.rank() == 0:
        _prune(run_dir, step, keep)


def _on_first_rank(act: Callable[[], None], group: dist.ProcessGroup | None) -> None:
    """Rank 0 acts, the others wait; when it cannot, all raise its OSError."""
    problem: OSError | None = None
    if distributed.rank() == 0:
        try:
            act()
        except OSError as error:
            problem = error
    problem = distributed.broadcast_object(problem, group)
    if problem is not None:
        raise problem


def _make_empty(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _complete(temporary: Path, folder: Path, document: dict[str, Any]) -> None:
    (temporary / STATE).write_text(json.dumps(document, indent=1) + "\n")
    _sync(temporary / STATE)
    for part in (*(p for p in temporary.iterdir() if p.is_dir()), temporary):
        _sync(part)
    if folder.exists():  # only an unusable one can stand here: a usable one would have been resumed from
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


class _HashingFile(io.BufferedWriter):
    """Hashes what passes through, so that nothing is read again."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.num_bytes, self.sha256 = 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.num_bytes += len(data)
        self.sha256.update(data)
        return super().write(data)

    def fileno(self) -> int:
        self.flush()  # DCP asks for it to sync: what is still in the buffer would miss that
        return super().fileno()


class _HashingFiles(FileSystem):
    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        path = Path(path)
        with _HashingFile(path) as file:
            yield file
        name = f"{path.parent.name}/{path.name}"
        self.facts[name] = {"bytes": file.num_bytes, "sha256": file.sha256.hexdigest()}


class _HashingWriter(HuggingFaceStorageWriter):
    """DCP's safetensors writer, every rank for itself, that keeps the size and hash of what it wrote."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True)
        files = _HashingFiles()
        self.fs, self.facts = files, files.facts


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the rank where it did."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def _not_written(folder: Path, cause: BaseException) -> str:
    earlier = [p for p in folders_of(folder.parents[1]) if p != folder]
    good = next((p for p in reversed(earlier) if _problem(p, share=slice(0)) is None), None)
    survivor = f"{good} is intact and the run will continue from it" if good else "there is no earlier checkpoint"
    return f"checkpoint {folder} could not be written ({cause}); {survivor}; free some space and run the same command again"


def _prune(run_dir: Path, step: int, keep: int) -> None:
    """Keep the last `keep` up to `step`. Folders past it were unusable, or training would have gone on from them."""
    folders = folders_of(run_dir)
    current = folders.index(run_dir / FOLDER / f"step_{step:08d}")
    kept = folders[max(0, current + 1 - keep) : current + 1]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in (run_dir / FOLDER).glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    """On disk, not only in the page cache: a rename must not overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def _metadata(folder: Path, part: str) -> dict[str, Any]:
    """Names, shapes and dtypes of a part, put together from the headers of its shards."""
    if not (folder / part).is_dir():
        raise ValueError(
            f"{folder} has no {part}/: it is of another version's layout; go on with that one, or start anew"
        )
    return HuggingFaceStorageReader(str(folder / part)).read_metadata().state_dict_metadata


def _fill(folder: Path, part: str, tensors: Tensors) -> None:
    """Read into `tensors`, in place; each rank for itself."""
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / part)), no_dist=True)


def _problem(folder: Path, *, share: slice) -> str | None:
    """Why a folder is not a checkpoint, or None; hashes are computed of this share of its files, sizes of all."""
    try:
        state = load_state(folder)
        if state.get("layout") != LAYOUT and (folder / "model.safetensors").is_file():
            return None  # whole, but of layout 1: reading it says so
        hashed = sorted(state["files"])[share]
        for name, expected in state["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if name in hashed and _sha256(folder / name) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return f"{STATE} is damaged ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    """The first few tensors in which two models differ."""
    names = [name for name in (*wanted, *(saved.keys() - wanted.keys())) if saved.get(name) != wanted.get(name)]
    told = [f"{name}: {saved.get(name, 'missing')} instead of {wanted.get(name, 'none')}" for name in names[:3]]
    return ", ".join(told) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
