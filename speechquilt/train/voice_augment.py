"""Voices and rooms that were not recorded: the log-mel of each training clip is stretched along frequency (another vocal
tract: Jaitly and Hinton, 2013), coloured by a smooth curve (another microphone) and laid over noise.

Trap: draws come from torch's global CPU generator, which is seeded per rank and held by every checkpoint, so a resumed run
draws what the killed one would have. Two ranks therefore draw other voices than one.

Axis letters: B rows, M mel bins, F frames (10 ms), K points of a curve.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from speechquilt.audio import SAMPLE_RATE, hz_to_mel, mel_to_hz
from speechquilt.train.feature_augment import FeatureAugment

CURVE_POINTS = 6  # of a microphone's curve, evenly along the mel bins
DB = 40.0  # decibels in one unit of Whisper's scaled log-mel: (log10 of the power + 4) / 4


@dataclass(frozen=True, kw_only=True)
class VoiceAugmentConfig:
    """How far the voices of training clips are changed. 0 everywhere changes nothing."""

    warp: float = 0.12
    """Frequencies are multiplied by a number drawn from 1 - this to 1 + this, below 0.5. More: more kinds of people, less
    like those that were recorded."""
    curve_db: float = 6.0
    """Largest gain or loss of a frequency, in dB, of the smooth curve that each clip is coloured by."""
    noise_share: float = 0.5
    """Share of the clips that are laid over noise, 0 to 1."""
    noise_db: tuple[float, float] = (25.0, 60.0)
    """How far below the loudest moment of the clip its noise lies, in dB: drawn from the first to the second."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.warp < 0.5:
            raise ValueError(f"warp={self.warp} must lie in 0..0.5, below; 0.1 is usual")
        if self.curve_db < 0:
            raise ValueError(f"curve_db={self.curve_db} must be at least 0 dB")
        if not 0.0 <= self.noise_share <= 1.0:
            raise ValueError(f"noise_share={self.noise_share} must lie in 0..1, it is a share")
        if not self.noise_db[0] <= self.noise_db[1]:
            raise ValueError(f"noise_db={self.noise_db} must rise, for example 25,60")

    def build(self) -> "VoiceAugment":
        return VoiceAugment(self)


class VoiceAugment(FeatureAugment):
    """`mel_BMF` in Whisper's scale -> the same words in other voices; draws on the CPU, so that every device hears the same."""

    def __init__(self, config: VoiceAugmentConfig) -> None:
        self.config = config

    def __call__(self, mel_BMF: torch.Tensor) -> torch.Tensor:
        c, (rows, bins, _), device = self.config, mel_BMF.shape, mel_BMF.device
        factor_B = 1 + c.warp * (2 * torch.rand(rows) - 1)
        curve_BK = c.curve_db * (2 * torch.rand(rows, CURVE_POINTS) - 1)
        noisy_B, level_B = torch.rand(2, rows)
        low, high = c.noise_db
        warped_BMF = warped(mel_BMF, factor_B)
        curve_BM = F.interpolate(curve_BK[:, None], bins, mode="linear", align_corners=True)[:, 0].to(device)
        coloured_BMF = warped_BMF + curve_BM[..., None] / DB
        noise_B11 = (coloured_BMF.amax((1, 2)) - (low + (high - low) * level_B).to(device) / DB)[:, None, None]
        return torch.where(
            (noisy_B < c.noise_share).to(device)[:, None, None], summed(coloured_BMF, noise_B11), coloured_BMF
        )


def warped(mel_BMF: torch.Tensor, factor_B: torch.Tensor) -> torch.Tensor:
    """Every frequency moves to `factor_B` (on the CPU) times itself; what comes from beyond the highest bin repeats that."""
    bins = mel_BMF.shape[1]
    step = float(hz_to_mel(np.array(SAMPLE_RATE / 2))) / (bins + 1)
    source_hz_BM = mel_to_hz(step * np.arange(1, bins + 1)) / factor_B.double().numpy()[:, None]
    source_BM = torch.from_numpy(hz_to_mel(source_hz_BM) / step - 1).float().clamp(0, bins - 1).to(mel_BMF.device)
    below_BM = source_BM.floor().clamp(max=bins - 2).long()
    share_BM1 = (source_BM - below_BM)[..., None]
    index_BMF = below_BM[..., None].expand_as(mel_BMF)
    return mel_BMF.gather(1, index_BMF) * (1 - share_BM1) + mel_BMF.gather(1, index_BMF + 1) * share_BM1


def summed(mel_BMF: torch.Tensor, other_BMF: torch.Tensor) -> torch.Tensor:
    """The log-mel of both powers added."""
    scale = 4 * torch.log(torch.tensor(10.0, device=mel_BMF.device))
    return torch.logaddexp(mel_BMF * scale, other_BMF * scale) / scale
