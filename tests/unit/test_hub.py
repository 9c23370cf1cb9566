"""Model folders by name: found in the cache that `huggingface_hub` keeps, with its network switched off."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from speechquilt.model.warm_start import read_base
from speechquilt.nn.hub import local_folder
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.tokenizer.whisper import whisper_start
from tests.dummies import base_text_tokenizer
from tests.parity import tiny_checkpoints, tiny_tokenizers

COMMIT = 40 * "a"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub in which nothing is; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(hub: Path, name: str, folder: Path) -> None:
    """`folder` as it lies in the cache after a download."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repository / "snapshots" / COMMIT)


def test_a_path_is_a_path(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == local_folder(tmp_path) == tmp_path


def test_a_name_stands_where_a_folder_does(tmp_path: Path, hub: Path) -> None:
    tiny_tokenizers.whisper(tmp_path / "whisper", max_source_positions=400, max_target_positions=160)
    texts = base_text_tokenizer([], 320, ["<|endoftext|>"])
    tiny_checkpoints.saved(tmp_path / "base", "llama", vocab_size=texts.size, bos_token_id=0, eos_token_id=0)
    texts.save(tmp_path / "base" / "tokenizer.json")
    for name in ("whisper", "base"):
        put(hub, f"someone/{name}", tmp_path / name)
    assert read_base(Path("hub:someone/base")).llama == read_base(tmp_path / "base").llama
    assert load_text_tokenizer(Path("hub:someone/base@main")).json == texts.json
    by_name, by_path = (
        whisper_start(Path(name)).state_dict() for name in ("hub:someone/whisper", tmp_path / "whisper")
    )
    assert all(by_name[key].equal(by_path[key]) for key in by_path)


@pytest.mark.parametrize("name", ["hub:nobody/nothing", "hub:no name at all", "hub:someone/base@gone", "hub:"])
def test_what_cannot_be_had_says_so(tmp_path: Path, hub: Path, name: str) -> None:
    (tmp_path / "base").mkdir()
    put(hub, "someone/base", tmp_path / "base")
    with pytest.raises(OSError, match="cannot be had from the hub"):
        local_folder(name)
