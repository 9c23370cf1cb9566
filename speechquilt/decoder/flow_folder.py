"""A `FlowDecoder` on disk: `config.json`, with the tokenizer's fingerprint and the mel inside, and `model.safetensors`."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from speechquilt.config import from_dict, to_dict
from speechquilt.decoder import checked_weights
from speechquilt.decoder.flow import FlowConfig, FlowDecoder
from speechquilt.files import write_json
from speechquilt.nn.hugging_face import SINGLE, read_json, read_weights

KIND = "flow"  # what config.json says it is of


def save(model: FlowDecoder, folder: Path) -> None:
    """Write the decoder; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"kind": KIND} | to_dict(model.config))
    save_file({name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}, folder / SINGLE)


def load(folder: Path) -> FlowDecoder:
    """Read what `save` wrote, on CPU and in eval mode.

    Raises FileNotFoundError or ValueError saying what is wrong with which file: missing, damaged, of another kind, of
    other sizes, or with weights that are not finite.
    """
    folder = Path(folder)
    config = config_of(folder)
    return filled(config, read_weights(folder / SINGLE), folder)


def config_of(folder: Path) -> FlowConfig:
    """The config alone, without the weights. Raises as `load`."""
    path = folder / "config.json"
    data = read_json(path)
    if (kind := data.pop("kind", None)) != KIND:
        raise ValueError(f"kind={json.dumps(kind)} in {path} must be {json.dumps(KIND)}; give a token-to-mel decoder")
    try:
        return from_dict(FlowConfig, data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; restore the file or train the decoder again") from error


def filled(config: FlowConfig, weights: dict[str, torch.Tensor], where: Path) -> FlowDecoder:
    """The decoder of this config with these weights, in eval mode; nothing is drawn. Raises as `checked_weights.filled`."""
    with torch.device("meta"):
        model = FlowDecoder(config)
    return checked_weights.filled(model, weights, where)
