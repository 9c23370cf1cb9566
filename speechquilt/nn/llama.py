"""A Llama-style transformer stack: RMSNorm, grouped-query attention with RoPE, SwiGLU, no biases.

It maps vectors to (normalised) vectors; embeddings and head are the caller's. Parameter names are those of Hugging Face
`LlamaModel`.
Trap: `step` and `extend` write the caches of the given state in place, see `KVState`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.nn.attention import Extension, KVState, Mask, Rope, attend, causal_mask
from speechquilt.nn.rope import RopeScaling, rope_tables, rotate


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a transformer stack. A plain Llama has neither `qkv_bias` nor `qk_norm` nor `rope_scaling`; they are
    there so that the weights of its relatives fit."""

    width: int
    """Numbers per token between the layers (the model's width). Parameters and compute grow with its square."""
    num_layers: int
    """Transformer layers, one after the other."""
    num_heads: int
    """Attention heads of each layer (of its queries). Must divide `width`, unless `head_width` is given."""
    num_kv_heads: int
    """Heads of the keys and values; must divide `num_heads`. Fewer: a smaller cache in generation (grouped-query
    attention). Equal to `num_heads`: ordinary attention."""
    ffn_width: int
    """Width inside the feed-forward part of each layer (SwiGLU), usually 2.5 to 4 times `width`."""
    rope_theta: float = 500_000.0
    """Base of the wavelengths in the rotary position embedding. Larger: positions far apart stay distinct."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm, so that nothing is divided by zero."""
    window: int | None = None
    """How many tokens, itself included, a token can attend to. None: all before it in its document."""
    head_width: int = 0
    """Numbers per attention head, even. 0: `width` / `num_heads`."""
    qkv_bias: bool = False
    """Whether the maps to queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether each head's queries and keys pass an RMSNorm, as in Qwen3."""
    rope_scaling: RopeScaling | None = None
    """How the positions of Llama 3.1 are stretched to longer contexts. None: they are not."""

    def __post_init__(self) -> None:
        if self.head_width == 0:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width={self.width} must be a multiple of num_heads={self.num_heads}; or give head_width"
                )
            object.__setattr__(self, "head_width", self.width // self.num_heads)
        if self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even, RoPE turns pairs; change width or num_heads")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; change one of them"
            )

    def rope(self, pos_BT: torch.Tensor) -> Rope:
        """Positions -> the tables that all layers share."""
        return rope_tables(pos_BT, self.head_width, self.rope_theta, self.rope_scaling)

    def build(self, seed: int = 0) -> "LlamaStack":
        stack = LlamaStack(self)
        init_weights(stack, torch.Generator().manual_seed(seed))
        return stack


def init_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Truncated normal at 3 sigma: linear maps with std (input width)^-0.5 (spec 2, 6.2), embeddings with std 1.

    The maps that write into the residual stream (`o_proj`, `down_proj`) are scaled by (2 x blocks of `module`)^-0.5.
    With smaller embeddings and unscaled maps the first block's output is far larger than the embedding of the token,
    and a latent model needs almost twice the steps to the same loss (docs/decisions/0007-initialisation.md).
    """
    writes = (2 * sum(isinstance(child, LlamaBlock) for child in module.modules())) ** -0.5
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            std = child.weight.shape[1] ** -0.5 * (writes if name.endswith(("o_proj", "down_proj")) else 1.0)
            nn.init.trunc_normal_(child.weight, std=std, a=-3 * std, b=3 * std, generator=generator)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.trunc_normal_(child.weight, a=-3.0, b=3.0, generator=generator)
        elif isinstance(child, nn.RMSNorm):
            nn.init.ones_(child.weight)


def split_heads(x_BTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`[B, T, H * K] -> [B, H, T, K]`."""
    B, T, D = x_BTD.shape
    return x_BTD.view(B, T, num_heads, D // num_heads).transpose(1, 2)


def merge_heads(x_BHTK: torch.Tensor) -> torch.Tensor:
    """`[B, H, T, K] -> [B, T, H * K]`."""
    return x_BHTK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        q_width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.width, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_width, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def _qkv(self, x_BTD: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q_BHTK = rotate(self.q_norm(split_heads(self.q_proj(x_BTD), self.num_heads)), rope)
        k_BHTK = rotate(self.k_norm(split_heads(self.k_proj(x_BTD), self.num_kv_heads)), rope)
        return q_BHTK, k_BHTK, split_heads(self.v_proj(x_BTD), self.num_kv_heads)

    def forward(self, x_BTD: torch.Tensor, mask: Mask, rope: Rope) -> torch.Tensor:
        q_BHTK, k_BHTK, v_BHTK = self._qkv(x_BTD, rope)
        return self.o_proj(merge_heads(attend(q_BHTK, k_BHTK, v_BHTK, mask)))

    def extend(self, x_NTD: torch.Tensor, layer: int, state: KVState, plan: Extension) -> torch.Tensor:
        q_NHTK, k_NHTK, v_NHTK = self._qkv(x_NTD, plan.rope)
        k_NHSK, v_NHSK = plan.write_and_read(state, layer, k_NHTK, v_NHTK)
        return self.o_proj(merge_heads(attend(q_NHTK, k_NHSK, v_NHSK, plan.mask_NTS)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """One pre-norm layer; `forward` over whole rows and `extend` over new tokens are twins."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = SwiGLU(config.width, config.ffn_width)

    def forward(self, x_BTD: torch.Tensor, mask: Mask, rope: Rope) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), mask, rope)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))

    def extend(self, x_NTD: torch.Tensor, layer: int, state: KVState, plan: Extension) -> torch.Tensor:
        x_NTD = x_NTD + self.self_attn.extend(self.input_layernorm(x_NTD), layer, state, plan)
        return x_NTD + self.mlp(self.post_attention_layernorm(x_NTD))


class LlamaStack(nn.Module):
    """Blocks and a final RMSNorm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def mask(self, doc_BT: torch.Tensor) -> Mask:
        """The mask `forward` wants for packed documents, with this stack's window: `[B, T, T]`."""
        return causal_mask(doc_BT, self.config.window)

    def forward(self, x_BTD: torch.Tensor, mask: Mask, pos_BT: torch.Tensor | None = None) -> torch.Tensor:
        """`mask` as of `mask()`; `pos_BT` default: the index in the row (RoPE is relative)."""
        if pos_BT is None:
            pos_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        rope = self.config.rope(pos_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, mask, rope)
        return self.norm(x_BTD)

    def init_state(self, num_rows: int, max_tokens: int) -> KVState:
        return KVState.empty(
            num_layers=self.config.num_layers,
            num_rows=num_rows,
            num_kv_heads=self.config.num_kv_heads,
            max_tokens=max_tokens,
            head_width=self.config.head_width,
            like=self.norm.weight,
        )

    @torch.no_grad()
    def extend(
        self, x_BTD: torch.Tensor, num_B: torch.Tensor, state: KVState, longest: int | None = None
    ) -> tuple[torch.Tensor, KVState]:
        """Append the first `num_B[b]` of T new tokens to row b (0 = the row is left alone): prompts, or one step.

        -> `x_BTD` (zeros where no token was appended) and the new state. Only the rows that append cost anything, and
        attention reads the caches up to the longest of them. Gives no gradients. Raises ValueError when a row outgrows
        `max_tokens`.

        A caller that knows how long rows get says so with `longest` (see `Extension.plan_unseen`): then all rows are
        computed, nothing waits for the device, and `x_BTD` means nothing where no token was appended.
        """
        num_new, config = x_BTD.shape[1], self.config
        plan: Extension | None
        if longest is None:
            plan = Extension.plan(state, num_B, num_new, config.rope, config.window)
        else:
            plan = Extension.plan_unseen(state, num_new, config.rope, config.window, longest)
        if plan is None:
            return torch.zeros_like(x_BTD), state
        x_NTD = x_BTD if plan.rows_N is None else x_BTD[plan.rows_N]
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaBlock)
            x_NTD = layer.extend(x_NTD, i, state, plan)
        x_NTD = self.norm(x_NTD)
        if plan.valid_NT is not None:
            x_NTD = x_NTD.masked_fill(~plan.valid_NT[..., None], 0)
        if plan.rows_N is not None:
            x_NTD = torch.zeros_like(x_BTD).index_copy(0, plan.rows_N, x_NTD)
        return x_NTD, state.advance(num_B)

    def step(
        self, x_BD: torch.Tensor, state: KVState, active_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, KVState]:
        """One token per row, each at its own position; rows where `active_B` is False are left alone and give zeros."""
        if active_B is None:
            active_B = torch.ones(len(x_BD), dtype=torch.bool, device=x_BD.device)
        x_BTD, state = self.extend(x_BD[:, None], active_B.long(), state)
        return x_BTD[:, 0], state
