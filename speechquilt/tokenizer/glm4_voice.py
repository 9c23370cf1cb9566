"""The released GLM-4-Voice tokenizer: its folder (`glm-4-voice-tokenizer`) as a `TokenEncoder` (spec 1, 2.3).

Its tokens are those that the released 9B model and its speech decoder speak.
Trap: it hears Whisper's features, which see the whole window of 30 s: `step` gives nothing before a window is complete
and `lookahead_s` says so, although the attention inside is block-causal. For streaming train a tokenizer on "stream"
features.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechquilt.nn.hugging_face import read_json
from speechquilt.tokenizer.saved_weights import filled, read_folder
from speechquilt.tokenizer.token_encoder import TokenEncoder, TokenEncoderConfig

PREFIX = "model.encoder."
MARK = "quantize_vocab_size"  # the key of config.json that no plain Whisper has
_QUANTIZER = {"codebook.weight": "codebook_KD", "ema_count": "ema_count_K", "ema_weight": "ema_sum_KD"}
_SIZES = {  # our fields and their keys in config.json
    "num_mels": "num_mel_bins",
    "width": "d_model",
    "num_heads": "encoder_attention_heads",
    "ffn_width": "encoder_ffn_dim",
    "layers_below": "quantize_position",
    "pooling": "pooling_kernel_size",
    "block_frames": "quantize_causal_block_size",
    "max_frames": "max_source_positions",
    "codebook_size": MARK,
}
_RULES = {  # key: what it must be, and what their code takes when it is missing
    "pooling_type": ("avg", "max"),
    "encoder_causal_convolution": (True, False),
    "encoder_causal_attention": (False, False),
    "quantize_causal_encoder": (False, False),
    "activation_function": ("gelu", "gelu"),
}


def is_glm4_voice(hf: dict[str, Any]) -> bool:
    """Whether a config.json is of such a tokenizer."""
    return MARK in hf


def load_glm4_voice(folder: Path) -> TokenEncoder:
    """The tokenizer in eval mode: ceil(samples / 1280) tokens, pieces of 30 s each alone.

    In the release's own batches, which pad all clips to the longest, the features of a shorter clip's last 12.5 ms see
    the padding; here a clip always gives what it gives alone. Raises FileNotFoundError or ValueError naming the file or
    key.
    """
    folder = Path(folder)
    config = _config(read_json(folder / "config.json"))
    weights = _weights(read_folder(folder), config.layers_below)
    return filled(config.build, _defaults(config, weights) | weights, folder)


def _config(hf: dict[str, Any]) -> TokenEncoderConfig:
    for key, (rule, missing) in _RULES.items():
        if (value := hf.get(key, missing)) != rule:
            raise ValueError(f"{key}={value!r} in config.json must be {rule!r}, as in the released tokenizer")
    for key in _SIZES.values():
        if not isinstance(hf.get(key), int):
            raise ValueError(f"config.json has {key}={hf.get(key)!r}; a whole number is expected, restore the file")
    if hf.get("pooling_position") != hf["quantize_position"]:
        raise ValueError(
            f"pooling_position={hf.get('pooling_position')} must equal quantize_position={hf['quantize_position']}: "
            "the codebook takes the pooled vectors"
        )
    sizes = {ours: hf[theirs] for ours, theirs in _SIZES.items()}
    return TokenEncoderConfig(**sizes, layers_above=0, features="whisper")


def _weights(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The tensors that make tokens, under our names: no final norm, no layer above the bottleneck, nothing else."""
    weights = {}
    for name, tensor in theirs.items():
        own = name.removeprefix(PREFIX)
        above = own.startswith("layers.") and int(own.split(".")[1]) >= num_layers
        if name.startswith(PREFIX) and not own.startswith("layer_norm") and not above:
            weights[f"quantizer.{_QUANTIZER[own]}" if own in _QUANTIZER else f"encoder.{own}"] = tensor
    return weights


def _defaults(config: TokenEncoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The quantiser's state that is not in the file: a codebook in use, its averages fresh when the folder has none."""
    codebook_KD = weights.get("quantizer.codebook_KD", torch.zeros(0, config.width))
    state = {
        "ema_count_K": torch.ones(len(codebook_KD)),
        "ema_sum_KD": codebook_KD.clone(),
        "updates": torch.zeros((), dtype=torch.long),
        "active": torch.tensor(True),
        "pool_ND": torch.zeros(0, config.width),
        "pool_count": torch.zeros((), dtype=torch.long),
    }
    return {f"quantizer.{name}": tensor for name, tensor in state.items()}
