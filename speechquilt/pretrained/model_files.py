"""A Hugging Face model folder from arrays and settings: weights as safetensors, settings as JSON."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from speechquilt.files import write_json

Arrays = dict[str, np.ndarray]
END_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def write_model(out: Path, weights: Arrays, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """model.safetensors in float32, config.json and generation_config.json in the folder `out`, which exists.

    The ids of `config` that say where a text begins and ends are written to `generation_config.json` too, where
    transformers looks for them.
    """
    arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in weights.items()}
    save_file(arrays, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", config | {"dtype": "float32"})
    write_json(out / "generation_config.json", {key: config[key] for key in END_IDS if key in config} | generation)


def bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> the float32 whose upper half it is."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
