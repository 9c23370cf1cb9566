"""The flow's estimator: a 1-D U-Net over mel frames with transformer blocks, as Matcha-TTS and CosyVoice build it (spec 1, 3.1).

Each level is a residual block, told the time of the flow, then transformer blocks; between levels the frames are halved
and doubled again.
Trap: attention and group norms see the whole window, later frames too. What it says of a frame depends on the window's
length, so equal results need equal windows.

Axis letters: B rows, C channels, F mel frames, E numbers of the time's embedding, H heads, K head width.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.conv_blocks import ConvBlock, kept

NORM_GROUPS = 8
TIME_SCALE = 1000  # of a time between 0 and 1, before its sines
FFN_FACTOR = 4


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the flow's estimator. The defaults are the released decoder's."""

    channels: tuple[int, ...] = (256, 256)
    """Channels of each level, each a multiple of 8; every level after the first sees half as many frames."""
    blocks: int = 4
    """Transformer blocks in each level."""
    mid_levels: int = 12
    """Levels at the lowest frame rate, between the way down and the way up."""
    num_heads: int = 8
    """Attention heads of each transformer block."""
    head_width: int = 64
    """Numbers per attention head."""

    def __post_init__(self) -> None:
        if not self.channels or any(c < 1 or c % NORM_GROUPS for c in self.channels):
            raise ValueError(f"channels={self.channels} must be one or more multiples of {NORM_GROUPS}")


class TransformerBlock(nn.Module):
    """Pre-norm block: attention to all real frames, then a GELU feed-forward layer."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        inner = num_heads * head_width
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, FFN_FACTOR * width)
        self.ffn_out = nn.Linear(FFN_FACTOR * width, width)

    def forward(self, x_BFC: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        normed_BFC = self.attention_norm(x_BFC)
        q, k, v = (
            part(normed_BFC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        seen_B11F = None if valid_B1F is None else valid_B1F[:, None] > 0
        y_BHFK = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11F)
        x_BFC = x_BFC + self.out(y_BHFK.transpose(1, 2).flatten(2))
        return x_BFC + self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(x_BFC))))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the time of the flow is added between them."""

    def __init__(self, channels_in: int, channels: int, time_width: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels_in, channels, NORM_GROUPS)
        self.time = nn.Linear(time_width, channels)
        self.second = ConvBlock(channels, channels, NORM_GROUPS)
        self.shortcut = nn.Conv1d(channels_in, channels, kernel_size=1)

    def forward(self, x_BCF: torch.Tensor, time_BE: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        y_BCF = self.first(x_BCF, valid_B1F) + self.time(F.mish(time_BE))[..., None]
        return self.second(y_BCF, valid_B1F) + self.shortcut(kept(x_BCF, valid_B1F))


class Level(nn.Module):
    """A residual block, then transformer blocks."""

    def __init__(self, config: UNetConfig, channels_in: int, channels: int) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels, time_width(config))
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, config.num_heads, config.head_width) for _ in range(config.blocks)
        )

    def forward(self, x_BCF: torch.Tensor, time_BE: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        x_BFC = self.residual(x_BCF, time_BE, valid_B1F).mT
        for block in self.blocks:
            x_BFC = block(x_BFC, valid_B1F)
        return x_BFC.mT


class UNet(nn.Module):
    """Noisy mel and what it is conditioned on, at one time of the flow -> the velocity there."""

    def __init__(self, config: UNetConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.channels_in = channels_in
        width = time_width(config)
        self.time_in, self.time_out = nn.Linear(channels_in, width), nn.Linear(width, width)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        down = (channels_in, *config.channels)
        lowest = len(config.channels) - 1
        for i, (before, after) in enumerate(itertools.pairwise(down)):
            stride = 1 if i == lowest else 2
            self.down.append(Level(config, before, after))
            self.shrink.append(nn.Conv1d(after, after, 3, stride, padding=1))
        last = config.channels[-1]
        self.mid = nn.ModuleList(Level(config, last, last) for _ in range(config.mid_levels))
        up = (*reversed(config.channels), config.channels[0])
        for i, (before, after) in enumerate(itertools.pairwise(up)):
            conv = nn.Conv1d(after, after, 3, padding=1) if i == lowest else nn.ConvTranspose1d(after, after, 4, 2, 1)
            self.up.append(Level(config, 2 * before, after))
            self.grow.append(conv)
        self.final = ConvBlock(config.channels[0], config.channels[0], NORM_GROUPS)
        self.out = nn.Conv1d(config.channels[0], channels_out, kernel_size=1)
        self._initialise()

    def forward(self, x_BCF: torch.Tensor, time_B: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        """`[B, C, F]` -> `[B, M, F]`, zero in the padding. `time_B` in [0, 1]; `valid_B1F`: 1 where a frame is real,
        else 0, None when all are. Every row needs a real frame."""
        time_BE = self.time_out(F.silu(self.time_in(time_embedding(time_B, self.channels_in).to(x_BCF.dtype))))
        skips = []
        for level, shrink in zip(self.down, self.shrink):
            x_BCF = level(x_BCF, time_BE, valid_B1F)
            skips.append((x_BCF, valid_B1F))
            x_BCF = shrink(kept(x_BCF, valid_B1F))
            valid_B1F = None if valid_B1F is None else valid_B1F[..., ::2]
        valid_B1F = skips[-1][1]  # the last level keeps its frames
        for level in self.mid:
            x_BCF = level(x_BCF, time_BE, valid_B1F)
        for level, grow in zip(self.up, self.grow):
            skip_BCF, valid_B1F = skips.pop()
            x_BCF = torch.cat([x_BCF[..., : skip_BCF.shape[-1]], skip_BCF], 1)
            x_BCF = grow(kept(level(x_BCF, time_BE, valid_B1F), valid_B1F))
        return kept(self.out(self.final(x_BCF, valid_B1F)), valid_B1F)

    def _initialise(self) -> None:
        """For training from scratch: unit gain in shortcuts and in the transformer blocks' projections, what these add
        to the residual stream shrinks with their number, and the first velocity is zero. Matcha-TTS draws all with
        He's gain, and 64 such blocks one after the other make their sum eight times as large as what came in."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                unit_gain(module.shortcut, 1.0)
        for block in blocks:
            for name, linear in block.named_children():
                if isinstance(linear, nn.Linear):
                    unit_gain(linear, (2 * len(blocks)) ** -0.5 if name.endswith("out") else 1.0)
        unit_gain(self.out, 0.0)


def unit_gain(layer: nn.Linear | nn.Conv1d, scale: float) -> None:
    """Inputs of variance 1 come out with standard deviation `scale`; no bias."""
    nn.init.normal_(layer.weight, std=scale * layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def time_width(config: UNetConfig) -> int:
    """Numbers of the time's embedding."""
    return 4 * config.channels[0]


def time_embedding(time_B: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, width]`: sines in the first half, cosines in the second, of the time times 1000."""
    half = width // 2
    step_C = torch.exp(torch.arange(half, device=time_B.device) * (-math.log(10000.0) / (half - 1)))
    angle_BC = TIME_SCALE * time_B[:, None].float() * step_C
    return torch.cat([angle_BC.sin(), angle_BC.cos()], 1)
