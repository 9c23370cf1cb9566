"""Speech tokens -> one vector of mel bands per mel frame: block-causal encoder, projection, length regulator (spec 1, 3.1).

The encoder is CosyVoice's: scaled embeddings, pre-norm blocks, attention with the relative positions of Transformer-XL
(arXiv 1901.02860), so that a window out of the middle of an utterance means the same as at its start.
Trap: blocks are counted from the first token that is given. A window must begin where a block of the utterance begins.

Axis letters: B rows, T tokens, R distances between tokens, D width, H heads, K head width, F mel frames, M mel bands.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.conv_blocks import ConvBlock, kept
from speechquilt.nn.batching import valid_places

REGULATOR_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class TokenStatesConfig:
    """The speech decoder's token encoder. The defaults are the released decoder's."""

    width: int = 512
    """Numbers per token between the layers; a multiple of `num_heads`, and even."""
    num_layers: int = 6
    """Layers, one after the other."""
    num_heads: int = 8
    """Attention heads of each layer."""
    ffn_width: int = 2048
    """Width inside the feed-forward part of each layer, usually 4 times `width`."""
    block_tokens: int = 10
    """Tokens in a block of attention: a token sees the past and the rest of its block. Shorter: sound can start sooner,
    and less is heard ahead."""
    dropout: float = 0.1
    """Share of the numbers that training sets to zero, 0 to 1. More: less is learned by heart."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(f"width={self.width} must be even and a multiple of num_heads={self.num_heads}")
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens={self.block_tokens} must be at least 1 token")


class RelativeAttention(nn.Module):
    """Self-attention whose scores also depend on how far apart two tokens are."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.distance = nn.Linear(width, width, bias=False)
        self.content_bias_HK = nn.Parameter(torch.zeros(num_heads, width // num_heads))
        self.distance_bias_HK = nn.Parameter(torch.zeros(num_heads, width // num_heads))

    def forward(self, x_BTD: torch.Tensor, seen_BTT: torch.Tensor, distance_RD: torch.Tensor) -> torch.Tensor:
        """`seen_BTT`: True where a token may look; `distance_RD` from `distances`."""
        q_BHTK, k_BHTK, v_BHTK = (self._heads(part(x_BTD)) for part in (self.query, self.key, self.value))
        distance_HRK = self._heads(self.distance(distance_RD))
        score_BHTR = (q_BHTK + self.distance_bias_HK[:, None]) @ distance_HRK.mT * q_BHTK.shape[-1] ** -0.5
        bias_BHTT = by_distance(score_BHTR).masked_fill(~seen_BTT[:, None], -torch.inf)
        q_BHTK = q_BHTK + self.content_bias_HK[:, None]
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, attn_mask=bias_BHTT.to(q_BHTK.dtype), dropout_p=dropout
        )
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def _heads(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD.unflatten(-1, self.content_bias_HK.shape).transpose(-3, -2)


class TokenLayer(nn.Module):
    """Pre-norm block: relative attention, then a SiLU feed-forward layer."""

    def __init__(self, config: TokenStatesConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = RelativeAttention(config.width, config.num_heads, config.dropout)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.ffn_in = nn.Linear(config.width, config.ffn_width)
        self.ffn_out = nn.Linear(config.ffn_width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor, seen_BTT: torch.Tensor, distance_RD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), seen_BTT, distance_RD))
        hidden_BTE = self.dropout(F.silu(self.ffn_in(self.ffn_norm(x_BTD))))
        return x_BTD + self.dropout(self.ffn_out(hidden_BTE))


class TokenStates(nn.Module):
    """Ids of a window of tokens -> `[B, T, M]`."""

    def __init__(self, config: TokenStatesConfig, codebook_size: int, num_mels: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(codebook_size, config.width)
        self.input = nn.Linear(config.width, config.width)
        self.input_norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TokenLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.to_mel = nn.Linear(config.width, num_mels)

    def forward(self, ids_BT: torch.Tensor, num_tokens_B: torch.Tensor) -> torch.Tensor:
        """Rows of at least one token each, padded with any id of the codebook."""
        num_tokens = ids_BT.shape[1]
        x_BTD = self.dropout(self.input_norm(self.input(self.embedding(ids_BT)))) * self.config.width**0.5
        distance_RD = self.dropout(distances(num_tokens, self.config.width, x_BTD))
        seen_TT = block_causal(num_tokens, self.config.block_tokens, ids_BT.device)
        seen_BTT = seen_TT & valid_places(num_tokens_B, num_tokens)[:, None]
        for layer in self.layers:
            x_BTD = layer(x_BTD, seen_BTT, distance_RD)
        return self.to_mel(self.norm(x_BTD))


class LengthRegulator(nn.Module):
    """Vectors of tokens -> vectors of frames, smoothed by convolutions."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(ConvBlock(num_mels, num_mels, groups=1) for _ in range(REGULATOR_BLOCKS))
        self.out = nn.Conv1d(num_mels, num_mels, kernel_size=1)

    def forward(self, states_BTM: torch.Tensor, token_BF: torch.Tensor, valid_B1F: torch.Tensor | None) -> torch.Tensor:
        """`token_BF`: which vector of its row each frame takes -> `[B, M, F]`, zero in the padding."""
        index_BFM = token_BF[..., None].expand(-1, -1, states_BTM.shape[-1])
        x_BMF = states_BTM.gather(1, index_BFM).mT
        for conv in self.convs:
            x_BMF = conv(x_BMF, valid_B1F)
        return kept(self.out(x_BMF), valid_B1F)


def block_causal(num_tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """Bool `[T, T]`: the query of a row sees the past and the rest of its block (spec 1, 2.2)."""
    token_T = torch.arange(num_tokens, device=device)
    return (token_T <= token_T[:, None]) | (token_T // block == token_T[:, None] // block)


def distances(num_tokens: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """`[2T - 1, D]`: sines (even places) and cosines (odd ones) of the distances T - 1 .. 1 - T, query minus key."""
    step_C = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    distance_R = torch.arange(num_tokens - 1, -num_tokens, -1, device=like.device)
    angle_RC = distance_R[:, None] * step_C
    return torch.stack([angle_RC.sin(), angle_RC.cos()], -1).flatten(1).to(like.dtype)


def by_distance(score_BHTR: torch.Tensor) -> torch.Tensor:
    """Scores of each query for every distance -> for every key, `[B, H, T, T]`."""
    token_T = torch.arange(score_BHTR.shape[2], device=score_BHTR.device)
    place_TT = len(token_T) - 1 - token_T[:, None] + token_T
    return score_BHTR.gather(3, place_TT.expand(*score_BHTR.shape[:2], -1, -1))
