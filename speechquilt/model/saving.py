"""A language model on disk: `config.json` (with its kind) and `model.safetensors`.

Trap: the folder does not know the vocabulary's layout, only its size; a run keeps `Vocab` and tokenizer beside it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from speechquilt.config import from_dict, nearest, to_dict
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.nn.hugging_face import read_json, read_weights

KINDS: dict[str, Any] = {"plain": PlainLMConfig, "latent": LatentLMConfig}


def save(model: PlainLM | LatentLM, folder: Path) -> None:
    """Write the model; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, cls in KINDS.items() if isinstance(model.config, cls))
    (folder / "config.json").write_text(json.dumps({"kind": kind} | to_dict(model.config), indent=1) + "\n")
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def load(folder: Path) -> PlainLM | LatentLM:
    """Read what `save` wrote, on CPU. Raises FileNotFoundError or ValueError saying what is wrong with which file."""
    path = folder / "config.json"
    config = _config(path, read_json(path))
    weights = read_weights(folder / "model.safetensors")
    model = empty(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit config.json beside it: {error}") from error
    return model


def config_of(folder: Path) -> PlainLMConfig | LatentLMConfig:
    """Kind and sizes alone, without the weights. Raises as `load`."""
    return _config(folder / "config.json", read_json(folder / "config.json"))


def empty(config: PlainLMConfig | LatentLMConfig) -> PlainLM | LatentLM:
    """The model with uninitialised weights, for a caller that fills them all: no time goes into drawing them."""
    with torch.device("meta"):
        model = PlainLM(config) if isinstance(config, PlainLMConfig) else LatentLM(config)
    return model.to_empty(device="cpu")


def _config(path: Path, data: dict[str, Any]) -> PlainLMConfig | LatentLMConfig:
    """The config of either kind; keys that came after the folder was written take their defaults."""
    kind = data.pop("kind", None)
    if kind is None and "model_type" in data:
        raise ValueError(
            f"{path} is of a Hugging Face model (model_type={data['model_type']!r}), not of ours; "
            "start from it with speechquilt.model.warm_start"
        )
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} in {path} is unknown; {nearest(str(kind), list(KINDS))}")
    try:
        return from_dict(KINDS[kind], data)
    except (TypeError, ValueError) as error:  # TypeError: a required key is missing
        raise ValueError(f"{path}: {error}; restore the file or train the model again") from error
