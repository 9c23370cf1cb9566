"""Public HiFi-GAN vocoders, in the layout of transformers' SpeechT5HifiGan, made to stream (Kong, Kim and Bae, 2020).

A sample depends on `lookahead_frames` frames to either side of its own and on nothing beyond, so a stream computes its new
frames with that many around them and gives what the whole utterance would have given.
Trap: its config.json holds rate, bands and hop, but not the window, the range and the logarithm of its mel. SpeechT5's own
is `SPEECHT5_MEL` in decimal logarithms; the universal HiFi-GAN's is the default `MelConfig` in natural ones.

Axis letters: M mel bands, F frames, S samples.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from speechquilt.decoder.checked_weights import filled
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.vocoder_rows import check_frames, rows_alone
from speechquilt.nn.hub import local_folder
from speechquilt.nn.hugging_face import read_json, read_weights, weight_files

MODEL_TYPE = "speecht5_hifigan"
SPEECHT5_MEL = MelConfig(sample_rate=16_000, low_hz=80.0, high_hz=7600.0)  # of microsoft/speecht5_hifigan
END_KERNEL = 7  # of the first and the last convolution


@dataclass(frozen=True)
class HifiGanState:
    """`mel_MF`: the frames that are still needed; `num_done`: how many of them are sound already."""

    mel_MF: torch.Tensor
    num_done: int


class HifiGan(nn.Module):
    """The vocoder around transformers' network, whose mel is `mel`, in logarithms to the base `log_base`."""

    def __init__(self, network: SpeechT5HifiGan, mel: MelConfig, log_base: float) -> None:
        """Raises ValueError when config and mel contradict each other, or a layer does not multiply the length."""
        super().__init__()
        config = network.config
        found = {
            "num_mels": (config.model_in_dim, mel.num_mels),
            "sample_rate": (config.sampling_rate, mel.sample_rate),
            "hop": (math.prod(config.upsample_rates), mel.hop),
        }
        for key, (theirs, given) in found.items():
            if theirs != given:
                raise ValueError(f"{key}={given} of the mel must be {theirs}, as in this vocoder's config.json")
        self.network = network
        self.mel, self.log_base = mel, log_base
        self.lookahead_frames = reach(config)

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Right-padded frames -> `wav_BS`, zero past a row's end. Raises ValueError on what is no log-mel."""
        return rows_alone(self._sound, mel_BMF, num_frames_B, self.mel)

    def init_state(self) -> HifiGanState:
        return HifiGanState(self.network.mean.new_zeros(self.mel.num_mels, 0), 0)

    @torch.no_grad()
    def step(
        self, mel_MF: torch.Tensor, state: HifiGanState, *, final: bool = False
    ) -> tuple[torch.Tensor, HifiGanState]:
        """Any number of new frames -> the samples that are now certain, and the new state; a fresh one after `final`."""
        mel_MF = torch.cat([state.mel_MF, check_frames(mel_MF, self.mel)], 1)
        stop = mel_MF.shape[1] - (0 if final else self.lookahead_frames)
        if stop <= state.num_done:
            return mel_MF.new_zeros(0), self.init_state() if final else HifiGanState(mel_MF, state.num_done)
        wav_S = self._sound(mel_MF)[state.num_done * self.mel.hop : stop * self.mel.hop]
        first = max(0, stop - self.lookahead_frames)
        return wav_S, self.init_state() if final else HifiGanState(mel_MF[:, first:], stop - first)

    def _sound(self, mel_MF: torch.Tensor) -> torch.Tensor:
        return self.network(mel_MF.float().T / math.log(self.log_base))


def load_hifi_gan(folder: str | Path, mel: MelConfig = SPEECHT5_MEL, log_base: float = 10.0) -> HifiGan:
    """A Hugging Face folder (or `hub:OWNER/NAME`) in eval mode. Raises FileNotFoundError or ValueError naming file or key."""
    folder = local_folder(folder)
    hf = read_json(folder / "config.json")
    if hf.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type={hf.get('model_type')!r} in {folder} must be {MODEL_TYPE!r}; give a HiFi-GAN folder"
        )
    vocoder = HifiGan(SpeechT5HifiGan(SpeechT5HifiGanConfig(**hf)), mel, log_base)
    weights = {name: tensor for path in weight_files(folder) for name, tensor in read_weights(path).items()}
    filled(vocoder.network, weights, folder)
    return vocoder.eval()


def reach(config: SpeechT5HifiGanConfig) -> int:
    """Frames to either side of its own that can change a frame's samples.

    Raises ValueError when an upsampling layer makes another number of samples than its rate says.
    """
    far = END_KERNEL // 2
    block = max(
        sum((kernel - 1) // 2 * (dilation + 1) for dilation in dilations)
        for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
    )
    for rate, kernel in zip(reversed(config.upsample_rates), reversed(config.upsample_kernel_sizes)):
        if (kernel - rate) % 2 or kernel < rate:
            raise ValueError(f"upsample_kernel_sizes: {kernel} must exceed its rate {rate} by an even number")
        far = (far + block + (kernel + rate) // 2 - 1) // rate
    return far + END_KERNEL // 2
