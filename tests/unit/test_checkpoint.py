"""A checkpoint is whole or not there: truncation, kills, a full disk; and what comes back is what went in."""

import contextlib
import errno
import json
import resource
import shutil

import pytest
import torch
from torch import nn

from speechquilt.train import checkpoint, optim
from tests.e2e import tiny_training

TENSORS = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "rng": {"cpu.0": torch.arange(9, dtype=torch.uint8)}}


def save(run_dir, step, tensors=TENSORS, keep=2):
    return checkpoint.save(run_dir, step, tensors=tensors, state={"seconds": 0.1}, keep=keep)


def test_what_comes_back_is_what_went_in(tmp_path):
    folder = save(tmp_path, 7)
    assert checkpoint.latest(tmp_path) == folder
    for name, named in TENSORS.items():
        loaded = checkpoint.load_tensors(folder, name)
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[k], named[k]) and loaded[k].dtype == named[k].dtype for k in named)
    state = checkpoint.load_state(folder)
    assert (state["step"], state["seconds"]) == (7, 0.1)


def test_the_last_ones_are_kept(tmp_path):
    for step in (5, 10, 9_999, 10_000):
        save(tmp_path, step)
    left = sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir())
    assert left == ["step_00009999", "step_00010000"]


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no usable checkpoint"):
        checkpoint.load_model(tmp_path, nn.Linear(1, 1))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad / file)
    with pytest.warns(UserWarning, match=r"step_00000002 is passed over.*checkpoint before it"):
        assert checkpoint.latest(tmp_path) == good


def test_one_wrong_bit_is_seen(tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    flip(bad / "model.safetensors")
    with pytest.warns(UserWarning, match="has changed since"):
        assert checkpoint.latest(tmp_path) == good


def test_an_unusable_newer_one_never_costs_a_good_one(tmp_path):
    save(tmp_path, 10)
    truncate(save(tmp_path, 20) / "state.json")
    folder = save(tmp_path, 15)  # the run that went on from 10
    assert checkpoint.latest(tmp_path) == folder
    assert sorted(p.name[-2:] for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["10", "15"]
    truncate(folder / "model.safetensors")
    assert save(tmp_path, 15) == folder  # in the place of the broken one
    assert checkpoint.latest(tmp_path) == folder


def test_a_kill_while_writing_leaves_nothing_that_counts(tmp_path):
    good = save(tmp_path, 1)
    unfinished = tmp_path / checkpoint.FOLDER / "step_00000002.tmp"
    shutil.copytree(good, unfinished)
    assert checkpoint.latest(tmp_path) == good
    save(tmp_path, 2)
    assert not unfinished.exists()


@contextlib.contextmanager
def small_disk():
    """No file may grow past 4 kB: a real write error in the middle of a file, without a disk of our own.

    Only around the write itself: the limit is the whole process's, and pytest's own output may be a longer file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_error_in_the_middle_of_a_file(tmp_path):
    good = save(tmp_path, 1)
    message = r"step_00000002 could not be written.*step_00000001 is intact.*free some space"
    with small_disk(), pytest.raises(OSError, match=message):
        save(tmp_path, 2, {"model": {"weight": torch.zeros(5000)}})
    assert checkpoint.latest(tmp_path) == good
    assert [p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()] == [good.name]


@pytest.mark.parametrize("file", ["model", "optimizer", "rng", "state.json"])
def test_disk_full_at_any_file_of_a_training_run(tmp_path, monkeypatch, file):
    """The run fails clearly, and the same command goes on from the last good checkpoint to the same weights."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    tiny_training.train(whole)

    def no_space(name, write):
        def maybe(*args, **kwargs):
            path = str(args[1] if name == "save_file" else args[0])
            if "step_00000010" in path and file in path:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            return write(*args, **kwargs)

        return maybe

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_space("save_file", checkpoint.save_file))
        patch.setattr(checkpoint, "_sync", no_space("_sync", checkpoint._sync))
        with pytest.raises(OSError, match=r"No space left.*step_00000005 is intact"):
            tiny_training.train(full)
    assert checkpoint.latest(full).name == "step_00000005"
    tiny_training.train(full)
    left, right = (checkpoint.load_tensors(checkpoint.latest(d), "model") for d in (whole, full))
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_optimizer_round_trip():
    def trained(steps):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        optimizer = optim.adamw(model, lr=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, device=torch.device("cpu"))
        for _ in range(steps):
            model(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()
        return optimizer

    optimizer, fresh = trained(3), trained(0)
    packed = checkpoint.pack_optimizer(optimizer)
    assert {"step.0.weight", "exp_avg.0.weight", "exp_avg_sq.1.bias"} <= packed.keys()
    checkpoint.unpack_optimizer(fresh, packed)
    again = checkpoint.pack_optimizer(fresh)
    assert packed.keys() == again.keys()
    assert all(torch.equal(packed[k], again[k]) for k in packed)
    assert fresh.param_groups[0]["weight_decay"] == 0.1


def test_tied_and_strided_weights_survive(tmp_path):
    x = torch.randn(4, 6)
    folder = save(tmp_path, 1, {"model": {"a": x, "b": x, "c": x.T, "d": x[1]}})
    loaded = checkpoint.load_tensors(folder, "model")
    assert torch.equal(loaded["a"], x)
    assert torch.equal(loaded["b"], x)
    assert torch.equal(loaded["c"], x.T)
    assert torch.equal(loaded["d"], x[1])


def test_load_model_from_a_run_or_a_checkpoint(tmp_path):
    model = nn.Linear(3, 2)
    folder = save(tmp_path, 4, {"model": model.state_dict()})
    for path in (tmp_path, folder):
        other = nn.Linear(3, 2)
        assert checkpoint.load_model(path, other) == 4
        assert torch.equal(other.weight, model.weight)
    with pytest.raises(ValueError, match="weights of another model"):
        checkpoint.load_model(tmp_path, nn.Linear(3, 5))


def test_state_is_readable_json(tmp_path):
    files = json.loads((save(tmp_path, 1) / "state.json").read_text())["files"]
    assert set(files) == {"model.safetensors", "rng.safetensors"}
