"""A first guess of the mel from the tokens alone, by regression, and how a flow goes on from it: for decoders that learn in
minutes.

The release's flow gets its tokens as a condition and has to find the whole mel. Here ConvNeXt blocks (Liu et al., 2022) make the
mean mel, which a few hundred steps teach them, and the flow makes what that lacks. Its estimator is scaled as in EDM (Karras
et al., 2022, section 5): before it has learned anything, the velocity is the best linear one.
Trap: the guess is blurred where tokens leave a choice (pitch, noise), so it is not the mel. And it is trained by a loss of its own:
without it, it would be a condition like any other.

Axis letters: B rows, T tokens, F mel frames, M mel bands, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.conv_blocks import kept
from speechquilt.decoder.mel_time import MelTime

KERNEL = 7
FFN_FACTOR = 3


@dataclass(frozen=True, kw_only=True)
class MelGuessConfig:
    """Sizes of the guess, and how much it counts."""

    width: int = 160
    """Numbers per frame between the blocks."""
    num_layers: int = 3
    """ConvNeXt blocks, each of which sees three frames to either side."""
    phases: int = 8
    """Places within a token that are told apart, at least 1: what a token sounds like changes while it lasts."""
    weight: float = 1.0
    """Weight of the guess's squared error in the loss; that of the velocity has 1."""
    missing_std: float = 0.5
    """What the guess lacks, as a standard deviation in the flow's scale, about. 1: nothing was guessed."""

    def __post_init__(self) -> None:
        for key in ("width", "num_layers", "phases", "weight", "missing_std"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be above 0")


class ConvNeXt(nn.Module):
    """A depthwise convolution over frames, then a GELU feed-forward layer, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.ffn_in, self.ffn_out = nn.Linear(width, FFN_FACTOR * width), nn.Linear(FFN_FACTOR * width, width)

    def forward(self, x_BDF: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        y_BFD = self.norm(self.depthwise(kept(x_BDF, valid_B1F)).mT)
        return x_BDF + self.ffn_out(F.gelu(self.ffn_in(y_BFD))).mT


class MelGuess(nn.Module):
    """Vectors of tokens `[B, T, D]` -> the mean mel `[B, M, F]` in the flow's scale, zero in the padding."""

    def __init__(self, config: MelGuessConfig, num_mels: int) -> None:
        super().__init__()
        self.config = config
        self.phase_PD = nn.Parameter(0.5 * torch.randn(config.phases, config.width))
        self.blocks = nn.ModuleList(ConvNeXt(config.width) for _ in range(config.num_layers))
        self.out = nn.Linear(config.width, num_mels)

    def forward(
        self, states_BTD: torch.Tensor, token_BF: torch.Tensor, phase_BF: torch.Tensor, valid_B1F: torch.Tensor | None
    ) -> torch.Tensor:
        """`token_BF`: which vector of its row each frame takes; `phase_BF` from `phases`."""
        index_BFD = token_BF[..., None].expand(-1, -1, states_BTD.shape[-1])
        x_BDF = (states_BTD.gather(1, index_BFD) + self.phase_PD[phase_BF]).mT
        for block in self.blocks:
            x_BDF = block(x_BDF, valid_B1F)
        return kept(self.out(x_BDF.mT).mT, valid_B1F)


def phases(time: MelTime, frame_BF: torch.Tensor, number: int) -> torch.Tensor:
    """Where in its token each frame of the utterance begins, 0 to `number` - 1."""
    return (frame_BF * time.tokens % time.frames) * number // time.frames


def linear_velocity(time_B11: torch.Tensor, std: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For what is missing of this deviation, between noise and it: factors of the point (the best linear velocity), of the
    point as the estimator's input, and of the estimator's output, both of which then have deviation 1."""
    variance = (1 - time_B11).square() + (time_B11 * std).square()
    of_point = (time_B11 * std**2 - (1 - time_B11)) / variance
    return of_point, variance.rsqrt(), std * variance.rsqrt()
