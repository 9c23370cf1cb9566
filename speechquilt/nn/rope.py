"""Rotary position embedding, in the half-split layout of Hugging Face Llama checkpoints.

Place in the pipeline: layer 1, used by every transformer here.
Trap: two layouts exist (interleaved pairs, split halves). Ours is split halves, so that weights move to and from
`LlamaForCausalLM` without a permutation.
"""

import torch


def rope_tables(pos_BT: torch.Tensor, head_width: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions -> `cos_B1TK`, `sin_B1TK` (float32), computed once per batch and shared by all layers."""
    inverse_K = theta ** -(torch.arange(0, head_width, 2, device=pos_BT.device, dtype=torch.float32) / head_width)
    angle_BTK = pos_BT[..., None].float() * inverse_K
    angle_BTK = torch.cat([angle_BTK, angle_BTK], dim=-1)
    return angle_BTK.cos()[:, None], angle_BTK.sin()[:, None]


def rotate(x_BHTK: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys by their positions' angles; `rope` comes from `rope_tables`."""
    cos_B1TK, sin_B1TK = rope
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = x_BHTK * cos_B1TK + torch.cat([-second, first], dim=-1) * sin_B1TK
    return turned.to(x_BHTK.dtype)
