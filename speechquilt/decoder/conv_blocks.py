"""Convolutions over mel frames that do not see padding: a row in a batch is what it is alone.

Trap: a group norm takes its mean and deviation over all frames of a row, so nothing here is causal, and plain
`nn.GroupNorm` would count the padding in.

Axis letters: B rows, C channels, F mel frames, G groups.
"""

import torch
import torch.nn.functional as F
from torch import nn


def kept(x_BCF: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
    """Zeros in the padding. `valid_B1F`: 1 where a frame is real, else 0; None when all are."""
    return x_BCF if valid_B1F is None else x_BCF * valid_B1F


class MaskedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose mean and deviation are those of the real frames; in float32 where there is padding."""

    def forward(self, x_BCF: torch.Tensor, valid_B1F: torch.Tensor | None = None) -> torch.Tensor:
        if valid_B1F is None:
            # `F.group_norm` refuses a single frame, which a short utterance has at the lowest level.
            return torch.group_norm(x_BCF, self.num_groups, self.weight, self.bias, self.eps)
        x_BGCF = x_BCF.float().unflatten(1, (self.num_groups, -1))
        valid_B11F = valid_B1F.float()[:, None]
        count_B111 = valid_B11F.sum(-1, keepdim=True) * x_BGCF.shape[2]
        mean_BG11 = (x_BGCF * valid_B11F).sum((2, 3), keepdim=True) / count_B111
        centred_BGCF = (x_BGCF - mean_BG11) * valid_B11F
        variance_BG11 = centred_BGCF.square().sum((2, 3), keepdim=True) / count_B111
        normed_BCF = (centred_BGCF * (variance_BG11 + self.eps).rsqrt()).flatten(1, 2)
        return (normed_BCF * self.weight[:, None] + self.bias[:, None]).to(x_BCF.dtype)


class ConvBlock(nn.Module):
    """Convolution of 3 frames, group norm, Mish. What comes out is zero in the padding."""

    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels, kernel_size=3, padding=1)
        self.norm = MaskedGroupNorm(groups, channels)

    def forward(self, x_BCF: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        x_BCF = self.norm(self.conv(kept(x_BCF, valid_B1F)), valid_B1F)
        return kept(F.mish(x_BCF), valid_B1F)
