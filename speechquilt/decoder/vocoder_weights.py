"""Weights that were read from a file, into a vocoder that was built: all of them, finite, in its shapes, or none."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

V = TypeVar("V", bound=nn.Module)


def filled(vocoder: V, weights: dict[str, torch.Tensor], where: Path) -> V:
    """`vocoder` with these weights as float32, in eval mode.

    Raises ValueError, naming tensor and rule, when names or shapes do not fit or a weight is not finite.
    """
    expected = vocoder.state_dict()
    if wrong := sorted(set(weights) ^ set(expected)):
        raise ValueError(
            f"{where}: {', '.join(wrong[:5])} missing or unknown; its weights do not fit its config, copy both again"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, its config expects {tuple(expected[name].shape)}; "
                "copy both again"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} has weights that are not finite; take an earlier checkpoint")
    vocoder.load_state_dict(weights)
    return vocoder.eval()
