"""A vocoder on disk: `config.json`, with its kind and its mel inside, and `model.safetensors` where it has weights.

A folder of transformers' SpeechT5HifiGan is a vocoder too.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from speechquilt.config import from_dict, nearest, to_dict
from speechquilt.decoder.checked_weights import filled
from speechquilt.decoder.hifi_gan import MODEL_TYPE, HifiGan, load_hifi_gan
from speechquilt.decoder.hift import Hift, HiftConfig
from speechquilt.decoder.phase import PhaseVocoder, PhaseVocoderConfig
from speechquilt.decoder.vocos import Vocos, VocosConfig
from speechquilt.files import write_json
from speechquilt.nn.hugging_face import SINGLE, read_json, read_weights

OwnVocoder = PhaseVocoder | Vocos | Hift
KINDS: dict[str, Any] = {"phase": PhaseVocoderConfig, "vocos": VocosConfig, "hift": HiftConfig}


def save(vocoder: OwnVocoder, folder: Path) -> None:
    """Write a vocoder of ours; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = next(name for name, cls in KINDS.items() if isinstance(vocoder.config, cls))
    write_json(folder / "config.json", {"kind": kind} | to_dict(vocoder.config))
    if weights := {name: tensor.detach().cpu().contiguous() for name, tensor in vocoder.state_dict().items()}:
        save_file(weights, folder / SINGLE)


def load(folder: Path) -> OwnVocoder | HifiGan:
    """Read what `save` wrote, or SpeechT5's HiFi-GAN, in eval mode and on CPU.

    Raises FileNotFoundError or ValueError saying what is wrong with which file: missing, damaged, of another kind or
    other sizes, or with weights that are not finite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    data = read_json(path)
    if data.get("model_type") == MODEL_TYPE:
        return load_hifi_gan(folder)
    kind = data.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} in {path} is no vocoder; {nearest(str(kind), list(KINDS))}")
    try:
        config = from_dict(KINDS[kind], data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; restore the file or train the vocoder again") from error
    made = config.build()
    return filled(made, read_weights(folder / SINGLE) if made.state_dict() else {}, folder)
