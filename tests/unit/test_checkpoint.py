"""A checkpoint is whole or not there: truncation, kills, a full disk; and what comes back is what went in."""

import contextlib
import errno
import json
import resource
import shutil
import threading

import pytest
import safetensors.torch
import torch
from torch import nn

from speechquilt.train import checkpoint, optim
from tests.e2e import tiny_training

TENSORS = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "rng": {"cpu.0": torch.arange(9, dtype=torch.uint8)}}


MODEL, RNG = (f"{part}/shard-00001-model-00001-of-00001.safetensors" for part in ("model", "rng"))


def writer(run_dir, keep=2, background=False):
    return checkpoint.Writer(run_dir, keep=keep, background=background, device=torch.device("cpu"))


def save(run_dir, step, tensors=TENSORS, keep=2):
    writer(run_dir, keep).save(step, tensors, {"seconds": 0.1})
    return run_dir / checkpoint.FOLDER / f"step_{step:08d}"


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


@pytest.mark.parametrize("file", [MODEL, RNG, "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    damage(bad / file)
    with pytest.warns(UserWarning, match=r"step_00000002 is passed over.*checkpoint before it"):
        assert checkpoint.latest(tmp_path) == good


def test_one_wrong_bit_is_seen(tmp_path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    flip(bad / MODEL)
    with pytest.warns(UserWarning, match="has changed since"):
        assert checkpoint.latest(tmp_path) == good


def test_an_unusable_newer_one_never_costs_a_good_one(tmp_path):
    save(tmp_path, 10)
    truncate(save(tmp_path, 20) / "state.json")
    folder = save(tmp_path, 15)  # the run that went on from 10
    assert checkpoint.latest(tmp_path) == folder
    assert sorted(p.name[-2:] for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["10", "15"]
    truncate(folder / MODEL)
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


def no_space(monkeypatch, step, file):
    """From now on nothing called `file` can be written into the checkpoint of `step`."""

    def unless(path):
        if f"step_{step:08d}" in str(path) and file in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    write, sync = checkpoint._HashingFile.write, checkpoint._sync

    def full_write(self, data):
        unless(self.raw.name)
        return write(self, data)

    def full_sync(path):
        unless(path)
        return sync(path)

    monkeypatch.setattr(checkpoint._HashingFile, "write", full_write)
    monkeypatch.setattr(checkpoint, "_sync", full_sync)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("file", ["model", "optimizer", "rng", "state.json"])
def test_disk_full_at_any_file_of_a_training_run(tmp_path, monkeypatch, file, background):
    """The run fails clearly, and the same command goes on from the last good checkpoint to the same weights."""
    whole, full = tmp_path / "whole", tmp_path / "full"
    tiny_training.train(whole)
    with monkeypatch.context() as patch:
        no_space(patch, 10, file)
        with pytest.raises(OSError, match=r"No space left.*step_00000005 is intact") as error:
            tiny_training.train(full, checkpoint_async=background)
    assert error.value.errno == errno.ENOSPC
    assert checkpoint.latest(full).name == "step_00000005"
    tiny_training.train(full, checkpoint_async=background)
    left, right = (checkpoint.load_tensors(checkpoint.latest(d), "model") for d in (whole, full))
    assert all(torch.equal(left[k], right[k]) for k in left)


class Slow:
    """The thread waits, before it has read any tensor, until it is told to go on."""

    def __init__(self, monkeypatch):
        self.began, self.go_on = threading.Event(), threading.Event()
        make_empty = checkpoint._make_empty

        def slowly(folder):
            make_empty(folder)
            self.began.set()
            assert self.go_on.wait(30)

        monkeypatch.setattr(checkpoint, "_make_empty", slowly)


def test_in_the_background_what_was_saved_is_written(tmp_path, monkeypatch):
    """The weights of the moment of `save`, though they change before they are on disk; and no checkpoint until then."""
    slow, weight = Slow(monkeypatch), torch.ones(3)
    background = writer(tmp_path, background=True)
    background.save(1, {"model": {"weight": weight}}, {})
    assert slow.began.wait(30)
    weight.zero_()
    assert checkpoint.latest(tmp_path) is None
    slow.go_on.set()
    background.wait()
    assert torch.equal(checkpoint.load_tensors(checkpoint.latest(tmp_path), "model")["weight"], torch.ones(3))


def test_one_in_flight(tmp_path, monkeypatch):
    """The next save waits for the one before, and raises what became of it."""
    slow, background = Slow(monkeypatch), writer(tmp_path, background=True)
    background.save(1, TENSORS, {})
    slow.began.wait(30)
    threading.Timer(0.2, slow.go_on.set).start()
    background.save(2, TENSORS, {})
    assert "step_00000001" in [p.name for p in checkpoint.folders_of(tmp_path)]
    background.wait()
    with monkeypatch.context() as patch:
        no_space(patch, 3, "model")
        background.save(3, TENSORS, {})
        with pytest.raises(OSError, match=r"step_00000003 could not be written.*step_00000002 is intact"):
            background.save(4, TENSORS, {})
    background.save(5, TENSORS, {})
    background.wait()
    assert checkpoint.latest(tmp_path).name == "step_00000005"


def test_an_older_layout_is_an_error_not_a_new_start(tmp_path):
    folder = tmp_path / checkpoint.FOLDER / "step_00000007"
    folder.mkdir(parents=True)
    data = safetensors.torch.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    (folder / "model.safetensors").write_bytes(data)
    (folder / "state.json").write_text(json.dumps({"step": 7, "files": {}}))
    with pytest.raises(ValueError, match="another version's layout"):
        checkpoint.load_model(tmp_path, nn.Linear(3, 2))


def test_optimizer_round_trip(tmp_path):
    def trained(steps, frozen=False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        model[1].requires_grad_(not frozen)
        optimizer = optim.adamw(model, lr=0.1, weight_decay=0.1, beta1=0.9, beta2=0.95, device=torch.device("cpu"))
        for _ in range(steps):
            model(torch.randn(2, 3)).square().sum().backward()
            optimizer.step()
        return optimizer

    optimizer, fresh = trained(3), trained(0)
    packed = checkpoint.pack_optimizer(optimizer)
    assert {"step.0.weight", "exp_avg.0.weight", "exp_avg_sq.1.bias"} <= packed.keys()
    folder = save(tmp_path, 1, {"optimizer": packed})
    checkpoint.load_optimizer(folder, fresh)
    again = checkpoint.pack_optimizer(fresh)
    assert packed.keys() == again.keys()
    assert all(torch.equal(packed[k], again[k]) for k in packed)
    assert fresh.param_groups[0]["weight_decay"] == 0.1
    with pytest.raises(ValueError, match=r"has a moment of '1\.\w+', which is not trained here"):
        checkpoint.load_optimizer(folder, trained(0, frozen=True))


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
    with pytest.raises(ValueError, match=r"weights of another model .*weight: \(2, 3\) instead of \(5, 3\)"):
        checkpoint.load_model(tmp_path, nn.Linear(3, 5))
    with pytest.raises(ValueError, match=r"bias: \(2,\) instead of none"):
        checkpoint.load_model(tmp_path, nn.Linear(3, 2, bias=False))


def test_state_is_readable_json(tmp_path):
    files = json.loads((save(tmp_path, 1) / "state.json").read_text())["files"]
    assert set(files) == {MODEL, RNG}
