"""Model folders of Hugging Face's Llama, Qwen2 and Qwen3: how their `config.json` and weights are read, and
`config.json` written, for our stack.

Trap: transformers 4 writes `rope_theta` and `rope_scaling` side by side, transformers 5 both in `rope_parameters`. We
read either and write both. A key that changes the computation and that we do not know how to follow is an error, never
ignored.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from speechquilt.nn.llama import LlamaConfig
from speechquilt.nn.rope import RopeScaling
from speechquilt.vocab import Vocab

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
EMBEDDING, HEAD, BODY = "model.embed_tokens.weight", "lm_head.weight", "model."  # names of the weights
LAYOUT_KEY = "speechquilt"  # key of config.json for the layout of the vocabulary, in the folders that we export
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # weights in one file, or the list of their shards
MAX_POSITIONS = 8192  # written for engines that want a limit; RoPE itself has none
_LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def llama_config(hf: dict[str, Any]) -> LlamaConfig:
    """Sizes of the stack that computes what this `config.json` means.

    Raises ValueError naming key, value, rule and remedy for another architecture or a variant that the stack does not
    compute.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"model_type={family!r} must be one of {', '.join(ARCHITECTURES)}; start from a checkpoint of these families"
        )
    _refuse_variants(hf, family)
    num_heads = _required(hf, "num_attention_heads")
    theta, scaling = _rope(hf)
    return LlamaConfig(
        width=_required(hf, "hidden_size"),
        num_layers=_required(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        ffn_width=_required(hf, "intermediate_size"),
        rope_theta=theta,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        head_width=hf.get("head_dim") or (128 if family == "qwen3" else 0),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        rope_scaling=scaling,
    )


def hugging_face_config(
    llama: LlamaConfig, vocab: Vocab, *, dtype: str = "float32", max_positions: int = MAX_POSITIONS
) -> dict[str, Any]:
    """The `config.json` under which transformers computes what this stack computes, over `vocab.size` ids.

    Raises ValueError for a stack that none of the three families computes.
    """
    family = _family(llama)
    scaling = None
    if llama.rope_scaling is not None:
        values = {theirs: getattr(llama.rope_scaling, ours) for ours, theirs in _LLAMA3_KEYS.items()}
        scaling = {"rope_type": "llama3", **values}
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": vocab.size,
        "hidden_size": llama.width,
        "intermediate_size": llama.ffn_width,
        "num_hidden_layers": llama.num_layers,
        "num_attention_heads": llama.num_heads,
        "num_key_value_heads": llama.num_kv_heads,
        "head_dim": llama.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": llama.norm_eps,
        "rope_theta": llama.rope_theta,  # transformers 4
        "rope_scaling": scaling and {**scaling, "rope_theta": llama.rope_theta},
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": llama.rope_theta},  # transformers 5
        "attention_bias": False,  # of Llama and Qwen3, for the output too; Qwen2 has its biases without being asked
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "pad_token_id": vocab.pad,
        "dtype": dtype,
    }


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises FileNotFoundError or ValueError saying what is wrong with the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a model folder has it, check the path")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # bytes that are not UTF-8 too
        raise ValueError(f"{path} is not JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; a JSON object is expected, restore the file")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder. Raises FileNotFoundError, also when there are pickled weights alone."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / INDEX} has no weight_map; copy or download this file again")
        return [folder / name for name in sorted(set(shards.values()))]
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has {pickled[0]} but no {SINGLE}: pickled weights can run code and are not read; "
            "download the safetensors version, or convert with transformers: from_pretrained, then save_pretrained"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face model folder")


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on CPU. Raises FileNotFoundError, or ValueError when the file is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the folder is not complete, copy or download this file again")
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy or download this file again") from error


def _family(llama: LlamaConfig) -> str:
    if llama.window is not None:
        raise ValueError(
            f"llama.window={llama.window} must be null: LlamaForCausalLM attends to the whole document; "
            "train without a window to export"
        )
    if llama.qkv_bias and llama.qk_norm:
        raise ValueError(
            "qkv_bias=true with qk_norm=true: Qwen2 has the biases, Qwen3 the head norms, no family both; "
            "train with one of them to export"
        )
    return "qwen2" if llama.qkv_bias else "qwen3" if llama.qk_norm else "llama"


def _required(hf: dict[str, Any], key: str) -> int:
    if not isinstance(hf.get(key), int):
        raise ValueError(f"config.json has {key}={hf.get(key)!r}; a whole number is expected, restore the file")
    return hf[key]


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base frequency and Llama 3.1's scaling, from whichever of the two layouts the file has."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f'rope_type={kind!r} must be "default" or "llama3"; start from a checkpoint with one of these, usually the '
            "base model before its context was stretched"
        )
    missing = [key for key in _LLAMA3_KEYS.values() if key not in rope]
    if missing:
        raise ValueError(f'rope_type="llama3" without {", ".join(missing)} in config.json; restore the file')
    values = {ours: rope[theirs] for ours, theirs in _LLAMA3_KEYS.items()}
    return theta, RopeScaling(
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_max_positions=int(values["original_max_positions"]),
    )


def _refuse_variants(hf: dict[str, Any], family: str) -> None:
    """Everything that would change the logits and that the stack does not have."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    sliding = {layer for layer in hf.get("layer_types") or () if layer != "full_attention"}
    found = {
        "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(hf.get("attention_bias")) and family != "qwen2", False),
        "mlp_bias": (bool(hf.get("mlp_bias")), False),
        "use_sliding_window": (bool(hf.get("use_sliding_window")), False),
        "layer_types": (sorted(sliding), []),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) or 1.0, 1.0),
        "quantization_config": (hf.get("quantization_config"), None),
    }
    for key, (value, rule) in found.items():
        if value != rule:
            raise ValueError(
                f"{key}={value!r} in config.json must be {rule!r}: our stack does not compute anything else; "
                "start from a checkpoint without it"
            )
