"""Model folders: safetensors in one file or in shards, and a tokenizer around them that never draws weights of its own.

Place in the pipeline: layer 2, under everything here that loads: our runs, Whisper, GLM-4-Voice, HuBERT.
Trap: weights are copies in float32, whatever the file holds. A view into the file would die with the file when a run is
saved over the folder that it started from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from speechquilt.audio import LogMel
from speechquilt.nn.hugging_face import read_json, read_weights
from speechquilt.tokenizer.token_encoder import TokenEncoder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

M = TypeVar("M", bound=TokenEncoder)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder; floating-point ones as float32. Raises FileNotFoundError or ValueError naming the file."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_weights(path).items():
            weights[name] = tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return weights


def filled(build: Callable[[], M], weights: dict[str, Tensor], where: Path) -> M:
    """The model of `build` with these weights, in eval mode. Raises ValueError when names or shapes do not fit."""
    with torch.device("meta"):
        model = build()
    expected = model.state_dict()
    if wrong := sorted(set(weights) ^ set(expected)):
        raise ValueError(f"{where} does not fit its config.json: {', '.join(wrong[:5])} missing or unknown")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where} does not fit its config.json: {name} has shape {tuple(tensor.shape)}, "
                f"{tuple(expected[name].shape)} is expected"
            )
    model.load_state_dict(weights, assign=True)
    model.log_mel = LogMel(model.config.num_mels, model.config.features)  # derived, so not in any file
    return model.eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises FileNotFoundError, also when there are only pickled weights."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / INDEX} has no weight_map; copy or download this file again")
        return [folder / name for name in sorted(set(shards.values()))]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    also = f", only {pickled[0]}, whose pickled weights can run code and are not read" if pickled else ""
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}{also}; download the safetensors version")
