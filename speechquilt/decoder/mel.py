"""The log-mel spectrogram between the two halves of a speech decoder, as HiFi-GAN, Matcha-TTS and CosyVoice define it.

Trap: it is not Whisper's. Magnitudes and not powers, the natural logarithm, no normalisation, frames that begin at a
multiple of the hop and not in the middle of one. A vocoder trained on another mel makes noise of this one, so both
halves name theirs and are compared.

Axis letters: B rows, S samples, F mel frames, M mel bands.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers.audio_utils import mel_filter_bank

SMALLEST_MAGNITUDE = 1e-5  # of a band; what the logarithm makes of silence
SMALLEST_POWER = 1e-9  # under the root, whose slope at 0 is infinite


@dataclass(frozen=True, kw_only=True)
class MelConfig:
    """What of a log-mel spectrogram a vocoder must know; the defaults are CosyVoice's and GLM-4-Voice's (spec 1, 3.1)."""

    sample_rate: int = 22_050
    """Hz of the waveform."""
    num_mels: int = 80
    """Bands."""
    fft_samples: int = 1024
    """Samples under a window, and points of its Fourier transform."""
    hop: int = 256
    """Samples from one frame to the next."""
    low_hz: float = 0.0
    """Where the lowest band begins."""
    high_hz: float = 8000.0
    """Where the highest band ends; at most half the sample rate."""

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.fft_samples or (self.fft_samples - self.hop) % 2:
            raise ValueError(
                f"hop={self.hop} must lie in 1..fft_samples={self.fft_samples} and differ from it by an even number"
            )
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise ValueError(
                f"low_hz={self.low_hz} and high_hz={self.high_hz} must rise within 0..{self.sample_rate / 2}, half of "
                "sample_rate"
            )

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop

    def require(self, given: "MelConfig", whose: str) -> None:
        """Raises ValueError naming what differs when `given`, the mel of `whose`, is not this one."""
        differing = [f.name for f in fields(self) if getattr(self, f.name) != getattr(given, f.name)]
        if differing:
            raise ValueError(
                f"{whose} has another mel: "
                + ", ".join(f"{key}={getattr(given, key)} and not {getattr(self, key)}" for key in differing)
                + "; take one that was trained on the same"
            )

    def build(self) -> "Mel":
        return Mel(self)


class Mel(nn.Module):
    """Waveform -> log-mel frames."""

    filters_HM: torch.Tensor
    window_S: torch.Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.config = config
        filters_HM = mel_filter_bank(
            num_frequency_bins=config.fft_samples // 2 + 1,
            num_mel_filters=config.num_mels,
            min_frequency=config.low_hz,
            max_frequency=config.high_hz,
            sampling_rate=config.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("filters_HM", torch.from_numpy(filters_HM).float(), persistent=False)
        self.register_buffer("window_S", torch.hann_window(config.fft_samples), persistent=False)

    def forward(self, wav_BS: torch.Tensor) -> torch.Tensor:
        """`[B, S]` at the config's rate -> `[B, M, S // hop]`. Raises ValueError when shorter than half a window."""
        config = self.config
        edge = (config.fft_samples - config.hop) // 2
        if wav_BS.shape[-1] <= edge:
            raise ValueError(f"{wav_BS.shape[-1]} samples are too few for a mel; more than {edge} are needed")
        padded_BS = F.pad(wav_BS[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum_BHF = torch.stft(
            padded_BS, config.fft_samples, config.hop, window=self.window_S, center=False, return_complex=True
        )
        magnitude_BHF = (spectrum_BHF.real.square() + spectrum_BHF.imag.square() + SMALLEST_POWER).sqrt()
        return (self.filters_HM.T @ magnitude_BHF).clamp(min=SMALLEST_MAGNITUDE).log()
