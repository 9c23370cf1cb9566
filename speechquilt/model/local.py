"""The local modules of the latent model: cross-attention between its two streams, the pooling of patches, a decoder
layer.

Everything here is as wide as the local stream. Cross-attention has no RoPE and adds its input once; BLT's released code
adds it twice (spec 2, 6.2).
"""

import torch
from torch import nn

from speechquilt.nn.attention import Mask, attend
from speechquilt.nn.llama import LlamaBlock, LlamaConfig, merge_heads, split_heads


class CrossAttention(nn.Module):
    """Multi-head attention from one stream to another: RMSNorm on both sides, no RoPE, residual added once."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.kv_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def keys_values(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is attended to -> keys and values `[B, H, S, K]`."""
        x_BSD = self.kv_norm(x_BSD)
        return split_heads(self.k_proj(x_BSD), self.num_heads), split_heads(self.v_proj(x_BSD), self.num_heads)

    def forward(self, x_BTD: torch.Tensor, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor, mask: Mask) -> torch.Tensor:
        """`mask`: which of the S keys each of the T queries may read."""
        q_BHTK = split_heads(self.q_proj(self.q_norm(x_BTD)), self.num_heads)
        return x_BTD + self.o_proj(merge_heads(attend(q_BHTK, k_BHSK, v_BHSK, mask)))


class UnitEncoder(nn.Module):
    """Token states of a unit -> its vector: max-pool, linear to k queries, cross-attention to the unit's own tokens.

    `forward` works on all units of a batch at once, by segments: a token belongs to exactly one unit, so the softmax
    runs over tokens grouped by unit and no units x tokens matrix is made. `over` works on padded units, for `step`.
    """

    def __init__(self, config: LlamaConfig, queries: int) -> None:
        super().__init__()
        self.queries = queries
        self.to_queries = nn.Linear(config.width, queries * config.width, bias=False)
        self.cross = CrossAttention(config)

    def forward(self, h_MD: torch.Tensor, unit_M: torch.Tensor, num_units: int) -> torch.Tensor:
        """M tokens of all rows, `unit_M` in 0..num_units-1 -> `[num_units, k * D]`, finite for units without tokens."""
        cross, k, H = self.cross, self.queries, self.cross.num_heads
        D = h_MD.shape[1]
        pooled_UD = _segment_max(h_MD, unit_M, num_units)
        query_UkD = self.to_queries(pooled_UD).view(num_units, k, D)
        q_UkHK = cross.q_proj(cross.q_norm(query_UkD)).view(num_units, k, H, D // H)
        kv_MD = cross.kv_norm(h_MD)
        key_MHK, value_MHK = (proj(kv_MD).view(-1, 1, H, D // H) for proj in (cross.k_proj, cross.v_proj))
        score_MkH = (q_UkHK.index_select(0, unit_M) * key_MHK).sum(-1, dtype=torch.float32) * (D // H) ** -0.5
        top_UkH = _segment_max(score_MkH.detach().flatten(1), unit_M, num_units).view(num_units, k, H)
        weight_MkH = (score_MkH - top_UkH.index_select(0, unit_M)).exp()
        total_UkH = weight_MkH.new_zeros(num_units, k, H).index_add(0, unit_M, weight_MkH)
        mixed_MD = (weight_MkH[..., None] * value_MHK).flatten(1)
        mixed_UkHK = mixed_MD.new_zeros(num_units, k * D).index_add(0, unit_M, mixed_MD).view(num_units, k, H, -1)
        # The largest weight of a unit is exp(0) = 1, so the clamp touches only units without tokens.
        mixed_UkHK = mixed_UkHK / total_UkH.clamp_min(1.0)[..., None]
        return (query_UkD + cross.o_proj(mixed_UkHK.flatten(2).to(h_MD.dtype))).flatten(1)

    def over(self, h_NPD: torch.Tensor, valid_NP: torch.Tensor) -> torch.Tensor:
        """N units padded to P tokens -> `[N, k * D]`."""
        pooled_ND = h_NPD.masked_fill(~valid_NP[..., None], -torch.inf).amax(1)
        query_NkD = self.to_queries(pooled_ND).view(len(h_NPD), self.queries, -1)
        keys, values = self.cross.keys_values(h_NPD)
        return self.cross(query_NkD, keys, values, valid_NP[:, None].expand(-1, self.queries, -1)).flatten(1)


def _segment_max(x_MD: torch.Tensor, segment_M: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Maximum over the rows of each segment, 0 where a segment has none."""
    index_MD = segment_M[:, None].expand_as(x_MD)
    return x_MD.new_zeros(num_segments, x_MD.shape[1]).scatter_reduce(0, index_MD, x_MD, "amax", include_self=False)


class DecoderLayer(nn.Module):
    """Cross-attention to the visible units, then an ordinary causal block."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.cross = CrossAttention(config)
        self.block = LlamaBlock(config)

    def forward(
        self,
        x_BLD: torch.Tensor,
        units_BSD: torch.Tensor,
        cross_mask: Mask,
        mask: Mask,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """`units_BSD`: k vectors per unit, S = U * k."""
        x_BLD = self.cross(x_BLD, *self.cross.keys_values(units_BSD), cross_mask)
        return self.block(x_BLD, mask, rope)
