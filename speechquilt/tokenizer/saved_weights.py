"""Model folders: safetensors in one file or in shards, and a tokenizer around them that never draws weights of its own.

Trap: weights are copies in float32, whatever the file holds. A view into the file would become invalid when a run is
saved over the folder that it started from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from speechquilt.audio import LogMel
from speechquilt.nn.hugging_face import read_weights, weight_files
from speechquilt.tokenizer.token_encoder import TokenEncoder

M = TypeVar("M", bound=TokenEncoder)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder; floating-point ones as float32. Raises FileNotFoundError or ValueError naming the
    file."""
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
