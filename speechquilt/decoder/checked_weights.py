"""Weights from a file into a network: read without running code; all of them, finite, in the network's shapes, or none.

Trap: a released checkpoint is a torch pickle, which can hold a program. It is read with `weights_only=True`, as plain tensors.
"""

import pickle
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def read_pickle(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a released checkpoint, on CPU. `what` it is, for the errors: "flow.pt of the folder ...".

    Raises FileNotFoundError, or ValueError when the file is damaged or holds more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give {what}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which could run code and is not read; download it again"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path} is not a plain table of tensors; give {what}")
    return weights


def filled(model: M, weights: dict[str, Tensor], where: Path) -> M:
    """`model`, which may be on the meta device, with these weights as float32, in eval mode.

    Raises ValueError, naming tensor and rule, when names or shapes do not fit or a weight is not finite.
    """
    expected = model.state_dict()
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
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    return model.eval()
