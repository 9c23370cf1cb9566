"""Model folders: what older versions wrote loads, and a folder that is not right says what is wrong with which file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.model.saving import load, save
from speechquilt.nn.llama import LlamaConfig
from speechquilt.nn.rope import RopeScaling

LLAMA = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=24)
PLAIN = PlainLMConfig(vocab_size=64, llama=LLAMA)
LATENT = LatentLMConfig(
    vocab_size=64, global_=LLAMA, local_width=8, encoder_layers=1, decoder_layers=1, local_heads=2, local_ffn=16
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)
RICH = LlamaConfig(
    width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=24, head_width=4, qk_norm=True, rope_scaling=SCALING
)
BYPASS = LatentLMConfig(
    vocab_size=64,
    global_=RICH,
    local_width=8,
    encoder_layers=1,
    decoder_layers=1,
    local_heads=2,
    local_ffn=16,
    text_path="bypass",
    num_text=40,
)


@pytest.mark.parametrize("config", [PLAIN, LATENT, BYPASS])
def test_what_is_saved_is_loaded(config: PlainLMConfig | LatentLMConfig, tmp_path: Path) -> None:
    model = config.build(seed=3)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("config", [PLAIN, LATENT])
def test_folders_from_before_the_newer_keys_load(config: PlainLMConfig | LatentLMConfig, tmp_path: Path) -> None:
    save(config.build(), tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    stack = data["llama" if config is PLAIN else "global_"]
    for key in ("head_width", "qkv_bias", "qk_norm", "rope_scaling"):
        del stack[key]
    for key in ("text_path", "num_text"):
        data.pop(key, None)
    path.write_text(json.dumps(data))
    assert load(tmp_path).config == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("vocab_size"), r"config\.json: .*vocab_size"),
        (lambda data: data["llama"].pop("width"), r"config\.json: .*width"),
        (lambda data: data.update(kind="latnet"), "kind='latnet' in .* did you mean latent"),
        (lambda data: data.pop("kind"), "kind=None in .* is unknown"),
        (
            lambda data: (data.pop("kind"), data.update(model_type="llama")),
            r"of a Hugging Face model \(model_type='llama'\), .*warm_start",
        ),
        (lambda data: data.update(vocab_sise=3), "unknown key 'vocab_sise' .* did you mean vocab_size"),
        (lambda data: data.update(vocab_size=128), r"model\.safetensors does not fit config\.json beside it"),
    ],
)
def test_a_config_that_is_not_right_says_so(change, said: str, tmp_path: Path) -> None:
    save(PLAIN.build(), tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    save(PLAIN.build(), tmp_path)
    path, good = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    path.write_bytes(good[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load(tmp_path)
    path.write_bytes(good)
    weights = load_file(path)
    del weights["head.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit config\.json .*head\.weight"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list"):
        load(tmp_path)
