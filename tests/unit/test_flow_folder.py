"""A token-to-mel decoder on disk: what was saved is loaded, and what is wrong with a folder is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechquilt.decoder import flow_folder
from speechquilt.decoder.mel_stream import StreamConfig
from tests.unit.tiny_flow import some_ids, tiny


def test_a_saved_decoder_is_the_same(tmp_path: Path) -> None:
    model = tiny(tokenizer="0123456789ab", stream=StreamConfig(chunk_tokens=(2, 4), prompt_tokens=4), token_rate=25.0)
    flow_folder.save(model, tmp_path / "new" / "flow")
    loaded = flow_folder.load(tmp_path / "new" / "flow")
    assert loaded.config == model.config == flow_folder.config_of(tmp_path / "new" / "flow")
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    ids_T = some_ids(9)
    assert torch.equal(loaded.decode([ids_T], [3])[0], model.decode([ids_T], [3])[0])


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    flow_folder.save(tiny(), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: x.half() for name, x in load_file(path).items()}, path)
    assert {p.dtype for p in flow_folder.load(tmp_path).parameters()} == {torch.float32}


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    flow_folder.save(tiny(), tmp_path)
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    weights, text = load_file(path), config.read_text()
    save_file({k: v for k, v in weights.items() if k != "speaker.bias"}, path)
    with pytest.raises(ValueError, match=r"speaker\.bias missing or unknown"):
        flow_folder.load(tmp_path)
    save_file(weights | {"speaker.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"speaker\.bias has shape \(7,\), its config expects \(6,\)"):
        flow_folder.load(tmp_path)
    save_file(weights | {"speaker.bias": torch.full((6,), torch.nan)}, path)
    with pytest.raises(ValueError, match=r"speaker\.bias has weights that are not finite"):
        flow_folder.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or cut short"):
        flow_folder.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        flow_folder.load(tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"euler_stepps": 3}))
    with pytest.raises(ValueError, match="did you mean euler_steps"):
        flow_folder.load(tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"kind": "vocos"}))
    with pytest.raises(ValueError, match=r'kind="vocos" .* must be "flow"'):
        flow_folder.load(tmp_path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        flow_folder.load(tmp_path)
