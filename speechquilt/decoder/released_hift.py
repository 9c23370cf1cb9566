"""The released `hift.pt` of CosyVoice and GLM-4-Voice as a `Hift` (spec 1, 3.1): convert once, then use our own folder.

The checkpoint is a torch pickle of plain tensors. It is read with `weights_only=True`, so it cannot run code.
Trap: a layer's weight lies there as a direction and a length (weight norm), under either of torch's two pairs of names.
"""

from pathlib import Path

from torch import Tensor

from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.checked_weights import filled, read_pickle
from speechquilt.decoder.hift import Hift, HiftConfig

RELEASED = HiftConfig()
_PAIRS = ((".weight_g", ".weight_v"), (".parametrizations.weight.original0", ".parametrizations.weight.original1"))
_DERIVED = "stft_window"  # a buffer of some versions
_PREFIX = "generator."  # of checkpoints that were saved beside their discriminator


def convert(path: Path, folder: Path, config: HiftConfig = RELEASED) -> Hift:
    """Read `hift.pt`, write our folder, and give the vocoder in eval mode. Raises as `read_released`."""
    vocoder = read_released(path, config)
    vocoder_folder.save(vocoder, folder)
    return vocoder


def read_released(path: Path, config: HiftConfig = RELEASED) -> Hift:
    """The vocoder of `hift.pt`.

    Raises FileNotFoundError, or ValueError when the file is damaged, holds more than tensors, or does not fit `config`.
    """
    path = Path(path)
    return filled(config.build(), folded(read_pickle(path, "hift.pt of the released decoder's folder")), path)


def folded(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, each weight in one piece: its direction at its length, per output of the layer."""
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in theirs.items()}
    weights.pop(_DERIVED, None)
    for length, direction in _PAIRS:
        for name in [name for name in weights if name.endswith(direction)]:
            layer = name.removesuffix(direction)
            if layer + length in weights:
                v, g = weights.pop(name).float(), weights.pop(layer + length).float()
                weights[f"{layer}.weight"] = v * (g / v.flatten(1).norm(dim=1).view(g.shape))
    return weights
