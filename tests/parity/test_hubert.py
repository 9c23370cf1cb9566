"""HuBERT units are the nearest centroids to transformers' own hidden states, window by window."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from speechquilt.tokenizer import hubert, load
from speechquilt.tokenizer.hubert import HubertUnits
from tests.parity import tiny_tokenizers
from tests.parity.tiny_tokenizers import noise

LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
SLOW = {  # 25 Hz, as mHuBERT's
    "conv_dim": (16,) * 8,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2, 2),
}


def expected(folder: Path, model: Any, wav_S: Tensor, layer: int) -> Tensor:
    """Units of one window, from the whole model: pad so that every begun token has a frame, nearest centroid by cdist."""
    stride = 640 if len(model.config.conv_stride) == 8 else 320
    field = 720 if stride == 640 else 400
    num_tokens = -(-len(wav_S) // stride)
    padded_S = torch.nn.functional.pad(wav_S, (0, (num_tokens - 1) * stride + field - len(wav_S)))
    with torch.no_grad():
        states = model(padded_S[None], output_hidden_states=True).hidden_states[layer][0]
    assert len(states) == num_tokens
    return torch.cdist(states, load_file(folder / "centroids.safetensors")["centroids"]).argmin(-1)


def units(tokenizer: Any, wav_S: Tensor) -> Tensor:
    ids_BT, num_tokens_B = tokenizer.encode(wav_S[None], torch.tensor([len(wav_S)]))
    assert num_tokens_B.tolist() == [ids_BT.shape[1]]
    return ids_BT[0]


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("changes", [{}, LARGE, SLOW], ids=["base", "large", "25 Hz"])
@pytest.mark.parametrize("num_samples", [1, 399, 1600, 12_345])
def test_units_of_a_window(tmp_path: Path, layer: int, changes: dict, num_samples: int) -> None:
    model = tiny_tokenizers.hubert(tmp_path, units={"layer": layer}, **changes)
    tokenizer, wav_S = load(tmp_path), noise(0, 2.0)[:num_samples]
    assert isinstance(tokenizer, HubertUnits)
    assert tokenizer.frame_rate == (25 if changes is SLOW else 50)
    ids_T = units(tokenizer, wav_S)
    assert torch.equal(ids_T, expected(tmp_path, model, wav_S, layer))
    assert num_samples < 10_000 or len(ids_T.unique()) > 5


def test_the_last_layer_is_read_before_the_final_norm(tmp_path: Path) -> None:
    model = tiny_tokenizers.hubert(tmp_path, units={"layer": 3}, **LARGE)
    model.encoder.layer_norm = torch.nn.Identity()
    wav_S = noise(2, 1.0)
    with torch.no_grad():
        states = model(torch.nn.functional.pad(wav_S, (0, 80))[None]).last_hidden_state[0]
    centroids = load_file(tmp_path / "centroids.safetensors")["centroids"]
    assert torch.equal(units(load(tmp_path), wav_S), torch.cdist(states, centroids).argmin(-1))


def test_normalised_input_is_the_feature_extractors(tmp_path: Path) -> None:
    model = tiny_tokenizers.hubert(tmp_path, units={"normalize": True}, **LARGE)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    wav_S = 0.2 * noise(3, 1.1)[:17_000] + 0.05
    normal_S = torch.from_numpy(extractor(wav_S.numpy(), sampling_rate=16000).input_values[0])
    tokenizer = load(tmp_path)
    assert torch.equal(units(tokenizer, wav_S), expected(tmp_path, model, normal_S, 2))
    assert not torch.equal(units(tokenizer, wav_S), expected(tmp_path, model, wav_S, 2))


def test_long_audio_is_windows_with_margins(tmp_path: Path) -> None:
    """Cores of 1.6 s and margins of 0.4 s: 80 and 20 tokens."""
    model = tiny_tokenizers.hubert(tmp_path)
    tokenizer, wav_S = load(tmp_path), noise(4, 4.21)  # 211 tokens, the last one short
    parts = [
        expected(tmp_path, model, wav_S[: 100 * 320], 2)[:80],
        expected(tmp_path, model, wav_S[60 * 320 : 180 * 320], 2)[20:100],
        expected(tmp_path, model, wav_S[140 * 320 :], 2)[20:],
    ]
    ids_T = units(tokenizer, wav_S)
    assert torch.equal(ids_T, torch.cat(parts))
    assert not torch.equal(ids_T, expected(tmp_path, model, wav_S, 2)), "the margin must matter in this test"


def test_passes_of_few_windows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizers.hubert(tmp_path)
    tokenizer, wav_BS = load(tmp_path), torch.stack([noise(5, 6.0), noise(6, 6.0)])
    whole_BT, _ = tokenizer.encode(wav_BS, torch.tensor([96_000, 90_000]))
    monkeypatch.setattr(hubert, "WINDOWS_PER_PASS", 2)
    assert torch.equal(tokenizer.encode(wav_BS, torch.tensor([96_000, 90_000]))[0], whole_BT)


def test_the_fingerprint_covers_weights_centroids_and_settings(tmp_path: Path) -> None:
    tiny_tokenizers.hubert(tmp_path)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    seen = {first}
    for name, scale in (
        ("model.safetensors", "feature_projection.projection.bias"),
        ("centroids.safetensors", "centroids"),
    ):
        tensors = load_file(tmp_path / name)
        tensors[scale] = tensors[scale] + 1e-3
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
        seen.add(load(tmp_path).fingerprint)
    (tmp_path / "units.json").write_text(json.dumps({"layer": 2, "core_s": 1.6, "margin_s": 0.2}))
    seen.add(load(tmp_path).fingerprint)
    assert len(seen) == 4


def test_a_folder_that_cannot_work_says_why(tmp_path: Path) -> None:
    tiny_tokenizers.hubert(tmp_path)
    settings = (tmp_path / "units.json").read_text()
    for text, message in (('{"layer": 4}', r"layer=4 .* 1\.\.3"), ('{"layr": 2}', "did you mean layer")):
        (tmp_path / "units.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    (tmp_path / "units.json").write_text(settings)
    save_file({"centroids": torch.zeros(5, 31)}, tmp_path / "centroids.safetensors")
    with pytest.raises(ValueError, match="hidden_size=32"):
        load(tmp_path)
    (tmp_path / "centroids.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"centroids\.safetensors"):
        load(tmp_path)
    (tmp_path / "units.json").unlink()
    with pytest.raises(ValueError, match=r"add units\.json"):
        load(tmp_path)


def test_missing_weights_are_not_drawn(tmp_path: Path) -> None:
    tiny_tokenizers.hubert(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.0.final_layer_norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack encoder\.layers\.0\.final_layer_norm\.bias"):
        load(tmp_path)


def test_units_cannot_be_read_back(tmp_path: Path) -> None:
    tiny_tokenizers.hubert(tmp_path)
    tokenizer = load(tmp_path)
    with pytest.raises(ValueError, match="without an ASR half"):
        tokenizer.read_back([units(tokenizer, noise(0, 0.5)).numpy()])
