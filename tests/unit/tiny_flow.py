"""Tiny token-to-mel decoders whose every part has weights: as built, the first velocity is zero and hides mistakes."""

from typing import Any

import torch

from speechquilt.decoder.flow import FlowConfig, FlowDecoder
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.token_states import TokenStatesConfig
from speechquilt.decoder.unet import UNetConfig

MEL = MelConfig(num_mels=6)


def tiny_config(block_tokens: int = 4, **changes: Any) -> FlowConfig:
    fields: dict[str, Any] = {
        "codebook_size": 20,
        "mel": MEL,
        "encoder": TokenStatesConfig(
            width=16, num_layers=2, num_heads=2, ffn_width=24, block_tokens=block_tokens, dropout=0.1
        ),
        "unet": UNetConfig(channels=(24, 16), blocks=1, mid_levels=1, num_heads=2, head_width=4),
        "speaker_width": 5,
        "euler_steps": 2,
    }
    return FlowConfig(**fields | changes)


def filled(model: FlowDecoder, seed: int = 0) -> FlowDecoder:
    """The same with random weights in every tensor, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            scale = 0.5 if x.ndim == 1 else (2 / x[0].numel()) ** 0.5
            x.copy_(scale * torch.randn(x.shape, generator=generator) + (x.ndim == 1 and "norm.weight" in name))
    return model.eval()


def tiny(seed: int = 0, **changes: Any) -> FlowDecoder:
    return filled(tiny_config(**changes).build(), seed)


def some_ids(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (num_tokens,), generator=torch.Generator().manual_seed(seed))
