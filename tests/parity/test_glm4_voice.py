"""The released GLM-4-Voice tokenizer's layout is read, and its tokens are those of a reference written from the spec alone.

The reference uses transformers' features and plain tensor operations, one clip at a time, masks by loops over frames.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import WhisperFeatureExtractor

from speechquilt.tokenizer import load
from speechquilt.tokenizer.token_encoder import TokenEncoder
from tests.parity.tiny_tokenizers import GLM4_CONFIG, glm4_voice_weights, noise, write_glm4_voice

WINDOW = 120 * 320  # samples of a piece: 30 s in the release


def layer_norm(x_FD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred_FD = x_FD - x_FD.mean(1, keepdim=True)
    std_F1 = (centred_FD.square().mean(1, keepdim=True) + 1e-5).sqrt()
    return centred_FD / std_F1 * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x_FD: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    y_FE = x_FD @ w[f"{name}.weight"].T
    return y_FE + w[f"{name}.bias"] if f"{name}.bias" in w else y_FE


def convolved(x_DF: Tensor, weight_EDK: Tensor, bias_E: Tensor, stride: int) -> Tensor:
    """Kernel 3, two zeros before the start, none after the end."""
    x_DF = torch.cat([torch.zeros(len(x_DF), 2), x_DF], 1)
    out = [(weight_EDK * x_DF[:, f : f + 3]).sum((1, 2)) + bias_E for f in range(0, x_DF.shape[1] - 2, stride)]
    return F.gelu(torch.stack(out, 1))


def attention(x_FD: Tensor, w: dict[str, Tensor], name: str, allowed_FF: Tensor, num_heads: int) -> Tensor:
    q, k, v = (linear(x_FD, w, f"{name}.{part}_proj") for part in ("q", "k", "v"))
    width = x_FD.shape[1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        score_FF = (q[:, part] @ k[:, part].T) * width**-0.5
        heads.append(score_FF.masked_fill(~allowed_FF, -1e9).softmax(1) @ v[:, part])
    return linear(torch.cat(heads, 1), w, f"{name}.out_proj")


def pooled(config: dict[str, Any], w: dict[str, Tensor], wav_S: Tensor) -> Tensor:
    """Pre-quantisation vectors of one piece, `[ceil(S / 1280), D]` (spec 1, 2.1-2.3 and 2.6)."""
    extractor = WhisperFeatureExtractor(feature_size=config["num_mel_bins"])
    made = extractor(
        wav_S.numpy(), sampling_rate=16000, padding="longest", pad_to_multiple_of=1280, return_attention_mask=True,
        return_tensors="pt",
    )  # fmt: skip
    real_F = made.attention_mask[0].bool()[::2]
    x_DF = convolved(made.input_features[0], w["conv1.weight"], w["conv1.bias"], 1)
    x_FD = convolved(x_DF, w["conv2.weight"], w["conv2.bias"], 2).T
    x_FD = x_FD + w["embed_positions.weight"][: len(x_FD)]
    block = config["quantize_causal_block_size"]
    allowed_FF = torch.zeros(len(x_FD), len(x_FD), dtype=torch.bool)
    for i in range(len(x_FD)):
        for j in range(len(x_FD)):
            allowed_FF[i, j] = (j <= i or i // block == j // block) and bool(real_F[j])
    for n in range(config["quantize_position"]):
        heads = config["encoder_attention_heads"]
        normed_FD = layer_norm(x_FD, w, f"layers.{n}.self_attn_layer_norm")
        x_FD = x_FD + attention(normed_FD, w, f"layers.{n}.self_attn", allowed_FF, heads)
        hidden = F.gelu(linear(layer_norm(x_FD, w, f"layers.{n}.final_layer_norm"), w, f"layers.{n}.fc1"))
        x_FD = x_FD + linear(hidden, w, f"layers.{n}.fc2")
    kept = int(real_F[::4].sum())
    return torch.stack([x_FD[4 * t : 4 * t + 4].mean(0) for t in range(kept)])


def reference(config: dict[str, Any], weights: dict[str, Tensor], wav_S: Tensor) -> Tensor:
    w = {name.removeprefix("model.encoder."): tensor for name, tensor in weights.items()}
    vectors_TD = torch.cat([pooled(config, w, piece_S) for piece_S in wav_S.split(WINDOW)])
    distance_TK = (vectors_TD[:, None] - w["codebook.weight"]).square().sum(2)
    return distance_TK.argmin(1)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random, but with codes that occur: what the encoder makes of noise."""
    weights = glm4_voice_weights(GLM4_CONFIG)
    w = {name.removeprefix("model.encoder."): tensor for name, tensor in weights.items()}
    vectors_TD = torch.cat([pooled(GLM4_CONFIG, w, noise(50 + i, 2.4)) for i in range(2)])
    weights["model.encoder.codebook.weight"] = vectors_TD[:: len(vectors_TD) // 24][:24].clone()
    return weights


def tokens(tokenizer: Any, wav_S: Tensor) -> Tensor:
    return tokenizer.encode(wav_S[None], torch.tensor([len(wav_S)]))[0][0]


@pytest.mark.parametrize("num_samples", [1, 1280, 1281, 5_000, 20_480, 30_001, WINDOW, WINDOW + 1, 2 * WINDOW + 9_999])
def test_tokens_are_the_references(tmp_path: Path, weights: dict[str, Tensor], num_samples: int) -> None:
    tokenizer = load(write_glm4_voice(tmp_path, GLM4_CONFIG, weights))
    wav_S = noise(num_samples, 8.0)[:num_samples]
    ids_T = tokens(tokenizer, wav_S)
    assert len(ids_T) == -(-num_samples // 1280)
    assert torch.equal(ids_T, reference(GLM4_CONFIG, weights, wav_S))
    assert num_samples < WINDOW or len(ids_T.unique()) > 5


@pytest.mark.parametrize("num_samples", [700, 6_400, 10_001])
def test_vectors_before_the_codebook_are_the_references(
    tmp_path: Path, weights: dict[str, Tensor], num_samples: int
) -> None:
    """Tokens are coarse; the masked frames of the last token and the mirrored end of a clip in a batch show here."""
    tokenizer = load(write_glm4_voice(tmp_path, GLM4_CONFIG, weights))
    assert isinstance(tokenizer, TokenEncoder)
    wav_S = 0.01 * noise(7, 1.0)[:num_samples]
    wav_S[-20:] = 0.5  # a click that the last window hears twice where it is mirrored
    w = {name.removeprefix("model.encoder."): tensor for name, tensor in weights.items()}
    with torch.no_grad():
        wav_BS = torch.stack([F.pad(wav_S, (0, 16_000 - num_samples)), noise(8, 1.0)])
        ours_BTD, num_tokens_B = tokenizer._pooled(wav_BS, torch.tensor([num_samples, 16_000]))
    assert (ours_BTD[0, : num_tokens_B[0]] - pooled(GLM4_CONFIG, w, wav_S)).abs().max() <= 1e-4


@pytest.mark.parametrize("change", ["shards", "no averages", "half precision", "unknown key"])
def test_folders_of_the_same_tokenizer(tmp_path: Path, weights: dict[str, Tensor], change: str) -> None:
    first, wav_S = load(write_glm4_voice(tmp_path / "a", GLM4_CONFIG, weights)), noise(3, 3.0)
    config, shards, other = dict(GLM4_CONFIG), 1, dict(weights)
    if change == "shards":
        shards = 3
    elif change == "no averages":
        other = {k: v for k, v in weights.items() if "ema" not in k}
    elif change == "half precision":
        other = {k: v.half() for k, v in weights.items()}
    else:
        config["some_new_key_of_transformers"] = 1
    second = load(write_glm4_voice(tmp_path / "b", config, other, shards=shards))
    assert torch.equal(tokens(first, wav_S), tokens(second, wav_S)) or change == "half precision"
    assert (first.fingerprint == second.fingerprint) == (change != "half precision")


def test_what_is_not_part_of_the_tokens_is_dropped(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    tokenizer = load(write_glm4_voice(tmp_path, GLM4_CONFIG, weights))
    assert isinstance(tokenizer, TokenEncoder)
    assert len(tokenizer.encoder.layers) == 2
    assert not any("layer_norm." in name and "layers." not in name for name in tokenizer.state_dict())
    assert torch.equal(tokenizer.encoder.embed_positions2.weight, weights["model.encoder.embed_positions2.weight"])
    assert torch.equal(tokenizer.quantizer.ema_sum_KD, weights["model.encoder.ema_weight"])
    with pytest.raises(ValueError, match="without an ASR half"):
        tokenizer.read_back([tokens(tokenizer, noise(0, 0.5)).numpy()])


def test_look_ahead_is_the_whole_piece(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Whisper's features see the loudest bin of the whole piece, so a late click changes the first token."""
    tokenizer = load(write_glm4_voice(tmp_path, GLM4_CONFIG, weights))
    assert tokenizer.lookahead_s == pytest.approx(2.4 - 0.08)
    wav_S = 1e-3 * noise(9, 2.4)
    loud_S = wav_S.clone()
    loud_S[-3000:] = noise(10, 1.0)[:3000]
    assert not torch.equal(tokens(tokenizer, wav_S)[:20], tokens(tokenizer, loud_S)[:20])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pooling_type", "max"), ("encoder_causal_convolution", False), ("encoder_causal_attention", True),
        ("quantize_causal_encoder", True), ("pooling_position", 1), ("quantize_causal_block_size", None),
    ],
)  # fmt: skip
def test_other_variants_are_refused(tmp_path: Path, weights: dict[str, Tensor], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        load(write_glm4_voice(tmp_path, GLM4_CONFIG | {key: value}, weights))


def test_a_missing_key_means_what_it_means_to_them(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    config = {key: value for key, value in GLM4_CONFIG.items() if key != "pooling_type"}
    with pytest.raises(ValueError, match="pooling_type='max'"):
        load(write_glm4_voice(tmp_path, config, weights))
    config = {k: v for k, v in GLM4_CONFIG.items() if k not in ("activation_function", "quantize_causal_encoder")}
    assert load(write_glm4_voice(tmp_path, config, weights)).vocab_size == 24


def test_damaged_folders_say_what_is_wrong(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_glm4_voice(tmp_path, GLM4_CONFIG, weights)
    path = folder / "model.safetensors"
    save_file({k: v for k, v in weights.items() if "layers.1.fc1" not in k}, path)
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.fc1\.bias"):
        load(folder)
    save_file(weights | {"model.encoder.conv1.weight": torch.zeros(32, 19, 3)}, path)
    with pytest.raises(ValueError, match=r"conv1\.weight has shape \(32, 19, 3\)"):
        load(folder)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load(folder)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin but no .*pickled weights can run code"):
        load(folder)


def test_a_plain_whisper_is_not_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(ValueError, match="whisper_start"):
        load(tmp_path)


def test_saving_over_the_folder_keeps_the_weights(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Loaded weights are no views into the file."""
    tokenizer = load(write_glm4_voice(tmp_path, GLM4_CONFIG, weights))
    before = tokenizer.fingerprint
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert tokenizer.fingerprint == before
