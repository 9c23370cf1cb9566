"""A language model on disk: `config.json` (with its kind) and `model.safetensors`.

Place in the pipeline: what pretraining writes and evals and chat read.
Trap: the folder does not know the vocabulary's layout, only its size; a run keeps `Vocab` and tokenizer beside it.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from speechquilt.config import from_dict, nearest, to_dict
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.lm import PlainLM, PlainLMConfig

KINDS: dict[str, Any] = {"plain": PlainLMConfig, "latent": LatentLMConfig}


def save(model: PlainLM | LatentLM, folder: Path) -> None:
    """Write the model; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, cls in KINDS.items() if isinstance(model.config, cls))
    (folder / "config.json").write_text(json.dumps({"kind": kind} | to_dict(model.config), indent=1) + "\n")
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def load(folder: Path) -> PlainLM | LatentLM:
    """Read what `save` wrote, on CPU. Raises FileNotFoundError or ValueError saying what is wrong with which file."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; a saved language model has it, check the path")
    data = json.loads((folder / "config.json").read_text())
    kind = data.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} in {folder / 'config.json'} is unknown; {nearest(str(kind), list(KINDS))}")
    model = from_dict(KINDS[kind], data).build()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model
