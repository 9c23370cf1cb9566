"""Vocoders on disk: each comes back as it was, with its mel; what is wrong with a folder is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.hift import HiftConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.vocos import VocosConfig

MEL = MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)
CONFIGS: dict[str, Any] = {
    "phase": PhaseVocoderConfig(mel=MEL, rounds=1),
    "vocos": VocosConfig(mel=MEL, width=16, ffn_width=24, num_layers=1),
    "hift": HiftConfig(
        mel=MEL, width=8, pitch_width=8, num_harmonics=1, upsample_rates=(4, 4), upsample_kernels=(8, 8), short_points=8,
        short_hop=2, block_kernels=(3,), block_dilations=((1,),), source_kernels=(3, 3), source_dilations=((1,), (1,)),
    ),
}  # fmt: skip


def sound(vocoder: Any) -> torch.Tensor:
    with torch.no_grad():
        return vocoder(torch.linspace(-5, 1, 20)[None, :, None].expand(1, 20, 6), torch.tensor([6]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_was_saved_comes_back(kind: str, tmp_path: Path) -> None:
    made = CONFIGS[kind].build()
    vocoder_folder.save(made, tmp_path / "new" / "folder")
    again = vocoder_folder.load(tmp_path / "new" / "folder")
    assert again.mel == MEL
    assert torch.equal(sound(made.eval()), sound(again))
    assert not again.training


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    vocoder_folder.save(CONFIGS["vocos"].build(), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for wrong, message in (
        ({"embed.bias": torch.full((16,), float("nan"))}, r"embed\.bias has weights that are not finite"),
        ({"embed.bias": torch.zeros(15)}, r"embed\.bias has shape \(15,\), its config expects \(16,\)"),
        ({"extra": torch.zeros(1)}, "extra missing or unknown"),
    ):
        save_file(weights | wrong, path)
        with pytest.raises(ValueError, match=message):
            vocoder_folder.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        vocoder_folder.load(tmp_path)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        vocoder_folder.load(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"kind": "vokos"}))
    with pytest.raises(ValueError, match=r"kind='vokos' .* is no vocoder; did you mean vocos"):
        vocoder_folder.load(tmp_path)
    path.write_text(json.dumps({"kind": "vocos", "widht": 3}))
    with pytest.raises(ValueError, match=r"unknown key 'widht' .* did you mean width.* train the vocoder again"):
        vocoder_folder.load(tmp_path)


def test_configs_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel=6 must be odd"):
        VocosConfig(kernel=6)
    with pytest.raises(ValueError, match=r"frames_ahead=28 must lie in 0\.\.27: 3 for each of the 9"):
        VocosConfig(frames_ahead=28)
    with pytest.raises(ValueError, match=r"make 128 samples of a frame; mel\.hop=256 must be the same"):
        HiftConfig(upsample_rates=(8, 4))
    with pytest.raises(ValueError, match="upsample_kernels: 15 must exceed its rate 8 by an even number"):
        HiftConfig(upsample_kernels=(16, 15))
