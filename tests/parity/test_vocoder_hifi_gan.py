"""HiFi-GAN folders: the sound is transformers' SpeechT5HifiGan's, of the mel in its own logarithm."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.hifi_gan import SPEECHT5_MEL, load_hifi_gan, reach
from speechquilt.decoder.mel import MelConfig

MEL = MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)
SIZES = {
    "model_in_dim": 20, "sampling_rate": 8000, "upsample_initial_channel": 16, "upsample_rates": [4, 8],
    "upsample_kernel_sizes": [8, 16], "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = SpeechT5HifiGan(SpeechT5HifiGanConfig(**SIZES))
    network.mean.normal_()
    network.scale.uniform_(0.5, 2.0)
    network.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("log_base", [10.0, math.e])
def test_the_sound_is_transformers(folder: Path, log_base: float) -> None:
    mel_BMF = torch.randn(2, 20, 30)
    vocoder = load_hifi_gan(folder, MEL, log_base)
    theirs = SpeechT5HifiGan.from_pretrained(folder)
    with torch.no_grad():
        wav_BS = vocoder(mel_BMF, torch.tensor([30, 17]))
        first_S = theirs(mel_BMF[0].T / math.log(log_base))
        second_S = theirs(mel_BMF[1, :, :17].T / math.log(log_base))
    assert (wav_BS[0] - first_S).abs().max() <= 1e-6
    assert (wav_BS[1, : 17 * 32] - second_S).abs().max() <= 1e-6
    assert not wav_BS[1, 17 * 32 :].any()


def test_reach_of_the_public_sizes() -> None:
    """By hand, from the output back: 3 + 60 = 63 samples, then (n + (8 + 4) / 2 - 1) // 4 for each of four layers."""
    far = 3
    for _ in range(4):
        far = (far + 5 * (1 + 3 + 5) + 5 * 3 + 5) // 4
    assert reach(SpeechT5HifiGanConfig()) == far + 3


def test_a_mel_that_the_config_contradicts_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_mels=80 of the mel must be 20"):
        load_hifi_gan(folder)
    with pytest.raises(ValueError, match="hop=64 of the mel must be 32"):
        load_hifi_gan(folder, MelConfig(sample_rate=8000, num_mels=20, fft_samples=128, hop=64, high_hz=4000.0))
    with pytest.raises(ValueError, match="num_mels=80"):
        vocoder_folder.load(folder)
    assert SPEECHT5_MEL.hop == math.prod(SpeechT5HifiGanConfig().upsample_rates)


def test_damaged_folders_say_what_is_wrong(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor for name, tensor in weights.items() if name != "conv_pre.bias"}, path)
    with pytest.raises(ValueError, match=r"conv_pre\.bias missing or unknown"):
        load_hifi_gan(folder, MEL)
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights can run code"):
        load_hifi_gan(folder, MEL)
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "speecht5"}))
    with pytest.raises(ValueError, match="model_type='speecht5'"):
        load_hifi_gan(folder, MEL)
    (folder / "config.json").write_text(
        json.dumps(SIZES | {"model_type": "speecht5_hifigan", "upsample_kernel_sizes": [8, 15]})
    )
    with pytest.raises(ValueError, match="15 must exceed its rate 8 by an even number"):
        load_hifi_gan(folder, MEL)
