"""Checkpoints: the whole state of a run as safetensors and JSON, complete or not there at all.

Place in the pipeline: layer 3, written by the trainer; later stages read the model with `load_model`.
Trap: a folder is a checkpoint only when its `state.json`, written last, agrees with the size and hash of every other
file. Anything else (a kill, a full disk, a bad copy) is passed over for the checkpoint before it.

    run_dir/checkpoints/step_00001000/model.safetensors       state_dict with buffers
                                      optimizer.safetensors   "exp_avg.<parameter>" and so on
                                      rng.safetensors         torch's generators, uint8, one per rank
                                      state.json              step, config, loader, sums, seconds, files
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from speechquilt.train.optim import parameter_names

FOLDER = "checkpoints"
STATE = "state.json"
Tensors = dict[str, torch.Tensor]


def save(run_dir: Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint (`tensors`: file name -> named tensors; `state`: plain JSON data), then drop all but `keep`.

    Raises OSError when it cannot be written; the checkpoints that were there before stay as they are.
    """
    folder = run_dir / FOLDER / f"step_{step:08d}"
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for name, named in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file(_separate(named), path)
            _sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        (temporary / STATE).write_text(json.dumps({"step": step, **state, "files": files}, indent=1) + "\n")
        _sync(temporary / STATE)
        _sync(temporary)
        if folder.exists():  # only an unusable one can stand here: a usable one would have been resumed from
            shutil.rmtree(folder)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(getattr(error, "errno", None) or errno.EIO, _not_written(folder, error)) from error
    _prune(run_dir, step, keep)
    return folder


def latest(run_dir: Path) -> Path | None:
    """The newest usable checkpoint of a run, or None. Warns about each newer one that is not usable."""
    for folder in reversed(_folders(run_dir)):
        problem = _problem(folder)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is passed over: {problem}; the checkpoint before it is used", stacklevel=2)
    return None


def load_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def load_tensors(folder: Path, name: str) -> Tensors:
    return load_file(folder / f"{name}.safetensors")


def load_model(path: Path, model: nn.Module) -> int:
    """Load the weights of a run folder (its newest checkpoint) or of one checkpoint folder; returns the step.

    Raises FileNotFoundError when there is none, ValueError when they belong to another model.
    """
    folder = path if (path / STATE).is_file() else latest(path)
    if folder is None:
        raise FileNotFoundError(f"{path} holds no usable checkpoint; train first, or check the path of the run")
    try:
        model.load_state_dict(load_tensors(folder, "model"))
    except RuntimeError as error:
        raise ValueError(
            f"{folder} holds the weights of another model than this {type(model).__name__} ({error}); "
            "build the model with the run's own config, or choose another run_dir"
        ) from error
    return load_state(folder)["step"]


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Its state as tensors named `<moment>.<parameter>`. Rates and decay are not state: the config decides them."""
    names = parameter_names(optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{key}.{names[i]}": value for i, entry in state.items() for key, value in entry.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `pack_optimizer`."""
    index = {name: i for i, name in enumerate(parameter_names(optimizer))}
    state: dict[int, Tensors] = {}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition(".")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _separate(tensors: Tensors) -> Tensors:
    """On the CPU, contiguous, and without shared storage, which safetensors refuses; tied weights are stored twice."""
    separate, seen = {}, set()
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        storage = x.untyped_storage().data_ptr()
        separate[name] = x.clone() if storage in seen else x
        seen.add(storage)
    return separate


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, unfinished ones left out."""
    return sorted(p for p in (run_dir / FOLDER).glob("step_*") if p.is_dir() and p.suffix != ".tmp")


def _problem(folder: Path) -> str | None:
    """Why a folder is not a checkpoint, or None."""
    try:
        files = load_state(folder)["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _sha256(folder / name) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        return f"{STATE} is damaged ({error})"
    return None


def _prune(run_dir: Path, step: int, keep: int) -> None:
    """Keep the last `keep` up to `step`. Folders past it were unusable, or training would have gone on from them."""
    folders = _folders(run_dir)
    current = folders.index(run_dir / FOLDER / f"step_{step:08d}")
    kept = folders[max(0, current + 1 - keep) : current + 1]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for leftover in (run_dir / FOLDER).glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _not_written(folder: Path, error: Exception) -> str:
    good = [p for p in _folders(folder.parents[1]) if _problem(p) is None and p != folder]
    survivor = f"{good[-1]} is intact and the run will continue from it" if good else "there is no earlier checkpoint"
    return f"checkpoint {folder} could not be written ({error}); {survivor}; free some space and run the same command again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """On disk, not only in the page cache: a rename must not overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
