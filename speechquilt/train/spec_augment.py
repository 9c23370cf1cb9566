"""SpecAugment: bands of time and frequency of the log-mel are hidden in training (Park et al., 2019). The paper's
recipe does without.

Trap: masks are drawn from torch's global CPU generator, which is seeded per rank and held by every checkpoint, so a
resumed run draws what the killed one would have. Two ranks therefore draw other masks than one.

Axis letters: B rows, M mel bins, F frames (10 ms), N masks.
"""

from dataclasses import dataclass

import torch

from speechquilt.train.feature_augment import FeatureAugment

HIDDEN = 0.0  # the middle of Whisper's scaled log-mel; transformers hides with the same


@dataclass(frozen=True, kw_only=True)
class SpecAugmentConfig:
    """How much of each training clip's log-mel is hidden. The defaults are LibriSpeech's "LD" policy with its
    `time_share` of 1."""

    time_masks: int = 2
    """Stretches of time hidden in each clip. 0: none."""
    time_frames: int = 100
    """Longest such stretch, in frames of 10 ms; each is 0 to this long, by chance."""
    time_share: float = 1.0
    """Longest such stretch as a share of the clip, above 0 and at most 1. It protects short clips."""
    mel_masks: int = 2
    """Bands of frequency hidden in each clip. 0: none."""
    mel_bins: int = 27
    """Widest such band, in mel bins; each is 0 to this wide, by chance."""

    def __post_init__(self) -> None:
        for key in ("time_masks", "time_frames", "mel_masks", "mel_bins"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0; 0 masks nothing")
        if not 0.0 < self.time_share <= 1.0:
            raise ValueError(
                f"time_share={self.time_share} must lie in 0..1, the largest share of a clip that is hidden"
            )

    def build(self) -> "SpecAugment":
        return SpecAugment(self)


class SpecAugment(FeatureAugment):
    """`mel_BMF` -> the same with masks; draws on the CPU, so that every device hides the same."""

    def __init__(self, config: SpecAugmentConfig) -> None:
        self.config = config

    def __call__(self, mel_BMF: torch.Tensor) -> torch.Tensor:
        """A new tensor; a gradient does not pass through what is hidden."""
        rows, bins, frames = mel_BMF.shape
        c = self.config
        longest = min(c.time_frames, int(c.time_share * frames))
        hidden_BF = _bands(rows, c.time_masks, longest, frames).to(mel_BMF.device)
        hidden_BM = _bands(rows, c.mel_masks, min(c.mel_bins, bins), bins).to(mel_BMF.device)
        return mel_BMF.masked_fill(hidden_BF[:, None, :] | hidden_BM[:, :, None], HIDDEN)


def _bands(rows: int, masks: int, widest: int, length: int) -> torch.Tensor:
    """`[rows, length]` bool, True inside any of `masks` bands of 0 to `widest`, anywhere in the length."""
    width_BN = torch.randint(0, widest + 1, (rows, masks))
    start_BN = (torch.rand(rows, masks) * (length - width_BN + 1)).floor().long()
    at_L = torch.arange(length)[:, None]
    return ((at_L >= start_BN[:, None]) & (at_L < (start_BN + width_BN)[:, None])).any(-1)
