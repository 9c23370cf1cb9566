"""Rotary position embedding, in the half-split layout of Hugging Face Llama checkpoints.

Trap: two layouts exist (interleaved pairs, split halves). Ours is split halves, so that weights move to and from
`LlamaForCausalLM` without a permutation.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow frequencies, so that a longer context can be read (Hugging Face: rope_type
    "llama3"). Between the two limits it goes over smoothly."""

    factor: float
    """By how much long wavelengths are stretched: 8 makes them 8 times as long."""
    low_freq_factor: float
    """Wavelengths above `original_max_positions` / this are stretched in full."""
    high_freq_factor: float
    """Wavelengths below `original_max_positions` / this stay as they are."""
    original_max_positions: int
    """Longest context that the model was first trained with, in tokens."""


def rope_tables(
    pos_BT: torch.Tensor, head_width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions -> `cos_B1TK`, `sin_B1TK` (float32), computed once per batch and shared by all layers."""
    inverse_K = theta ** -(torch.arange(0, head_width, 2, device=pos_BT.device, dtype=torch.float32) / head_width)
    if scaling is not None:
        turns_K = scaling.original_max_positions * inverse_K / (2 * math.pi)  # in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_K = ((turns_K - low) / (high - low)).clamp(0, 1)
        inverse_K = inverse_K * (kept_K + (1 - kept_K) / scaling.factor)
    angle_BTK = pos_BT[..., None].float() * inverse_K
    angle_BTK = torch.cat([angle_BTK, angle_BTK], dim=-1)
    return angle_BTK.cos()[:, None], angle_BTK.sin()[:, None]


def rotate(x_BHTK: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys by their positions' angles; `rope` comes from `rope_tables`."""
    cos_B1TK, sin_B1TK = rope
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = x_BHTK * cos_B1TK + torch.cat([-second, first], dim=-1) * sin_B1TK
    return turned.to(x_BHTK.dtype)
