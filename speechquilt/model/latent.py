"""The latent speech-text model: patch encoder, global transformer over units, patch decoder (spec 2, 6).

Place in the pipeline: a `protocols.LanguageModel`; the two booleans of a Batch say what a unit is and when its global
output may be read. Without them every token is a unit.
Trap: the prediction at t reads the global outputs of units < visible[t], which is one less than it seems inside an open
patch. `step` mirrors this: a unit runs through the global transformer when it closes, or, a short patch, when the next
token opens another unit.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from speechquilt.nn.attention import Extension, KVState, attend, causal_mask, read_cache, write_cache
from speechquilt.nn.llama import LlamaBlock, LlamaConfig, LlamaStack, init_weights, merge_heads, split_heads
from speechquilt.types import Batch
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class LatentLMConfig:
    """`queries` vectors per unit (k); `window`: reach of local self-attention in tokens and of cross-attention in units."""

    vocab_size: int
    global_: LlamaConfig
    local_width: int
    encoder_layers: int
    decoder_layers: int
    local_heads: int
    local_ffn: int
    queries: int = 2
    window: int = 512

    @property
    def local(self) -> LlamaConfig:
        """Sizes of one local layer; the number of layers counts encoder and decoder."""
        return LlamaConfig(
            width=self.local_width,
            num_layers=self.encoder_layers + self.decoder_layers,
            num_heads=self.local_heads,
            num_kv_heads=self.local_heads,
            ffn_width=self.local_ffn,
            rope_theta=self.global_.rope_theta,
            norm_eps=self.global_.norm_eps,
            window=self.window,
        )

    def for_vocab(self, vocab: Vocab) -> "LatentLMConfig":
        """The same model with the sizes of this vocabulary."""
        return replace(self, vocab_size=vocab.size)

    def build(self, seed: int = 0) -> "LatentLM":
        model = LatentLM(self)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model


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

    def forward(
        self, x_BTD: torch.Tensor, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor, mask_BTS: torch.Tensor
    ) -> torch.Tensor:
        q_BHTK = split_heads(self.q_proj(self.q_norm(x_BTD)), self.num_heads)
        return x_BTD + self.o_proj(merge_heads(attend(q_BHTK, k_BHSK, v_BHSK, mask_BTS)))


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
        """M tokens of all rows, `unit_M` in 0..num_units-1 -> `[num_units, k * D]`; units without tokens: anything finite."""
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


@dataclass(frozen=True, kw_only=True)
class LatentState:
    """Incremental state, one document per row. Caches are written in place (see `KVState`).

    `local`: self-attention of the encoder layers, then of the decoder layers; `global_`: counted in units; `cross`: what
    the decoder layers read, k entries per unit; `open_BPD`, `open_B`: encoder states of the open unit and their number.
    """

    local: KVState
    global_: KVState
    cross: KVState
    open_BPD: torch.Tensor
    open_B: torch.Tensor

    def reset(self, rows_B: torch.Tensor) -> "LatentState":
        """The rows where bool `rows_B` is True begin a new document."""
        return replace(
            self,
            local=self.local.reset(rows_B),
            global_=self.global_.reset(rows_B),
            cross=self.cross.reset(rows_B),
            open_B=self.open_B.masked_fill(rows_B, 0),
        )


class LatentLM(nn.Module):
    def __init__(self, config: LatentLMConfig) -> None:
        super().__init__()
        self.config, self.local = config, config.local
        unit_width = config.queries * config.local_width
        self.embedding = nn.Embedding(config.vocab_size, config.local_width)
        self.encoder = nn.ModuleList(LlamaBlock(self.local) for _ in range(config.encoder_layers))
        self.unit_encoder = UnitEncoder(self.local, config.queries)
        self.to_global = (
            nn.Identity() if unit_width == config.global_.width else nn.Linear(unit_width, config.global_.width, False)
        )
        self.global_ = LlamaStack(config.global_)
        self.from_global = nn.Linear(config.global_.width, unit_width, bias=False)
        self.decoder = nn.ModuleList(DecoderLayer(self.local) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(config.local_width, eps=config.global_.norm_eps)
        self.head = nn.Linear(config.local_width, config.vocab_size, bias=False)

    def blocks(self) -> list[nn.Module]:
        """The parts that a trainer shards, compiles and recomputes one by one."""
        return [*self.encoder, *self.global_.layers, *self.decoder]

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> `logits_BTV`; masks and RoPE tables are made once and shared by all layers."""
        mask_BTT = causal_mask(batch.doc_BT, self.config.window)
        pos_1T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)[None]
        rope = self.local.rope(pos_1T)
        x_BTD = self.embedding(batch.ids_BT)
        for block in self.encoder:
            x_BTD = block(x_BTD, mask_BTT, rope)
        unit_BT = batch.unit_BT
        num_units = int(unit_BT[:, -1].max()) + 1
        doc_BU = unit_docs(batch.doc_BT, unit_BT, num_units)
        key_BSD = self._global_keys(x_BTD, unit_BT, doc_BU)
        mask_BTS = cross_mask(batch, doc_BU, self.config.window).repeat_interleave(self.config.queries, dim=2)
        for layer in self.decoder:
            assert isinstance(layer, DecoderLayer)
            x_BTD = layer.cross(x_BTD, *layer.cross.keys_values(key_BSD), mask_BTS)
            x_BTD = layer.block(x_BTD, mask_BTT, rope)
        return self.head(self.norm(x_BTD))

    def _global_keys(self, h_BTD: torch.Tensor, unit_BT: torch.Tensor, doc_BU: torch.Tensor) -> torch.Tensor:
        """Token states -> what the decoder attends to, k vectors per unit: `[B, U * k, D]`."""
        B, U = doc_BU.shape
        flat_M = (unit_BT + U * torch.arange(B, device=unit_BT.device)[:, None]).flatten()
        z_BUD = self.to_global(self.unit_encoder(h_BTD.flatten(0, 1), flat_M, B * U)).view(B, U, -1)
        g_BUD = self.global_(z_BUD, self.global_.mask(doc_BU))
        return self.from_global(g_BUD).view(B, U * self.config.queries, -1)

    def init_state(self, num_rows: int, max_tokens: int) -> LatentState:
        """One document per row, up to `max_tokens` tokens each."""

        def caches(num_layers: int, size: int) -> KVState:
            return KVState.empty(
                num_layers=num_layers,
                num_rows=num_rows,
                num_kv_heads=self.local.num_heads,
                max_tokens=size,
                head_width=self.local.head_width,
                like=self.norm.weight,
            )

        return LatentState(
            local=caches(self.local.num_layers, max_tokens),
            global_=self.global_.init_state(num_rows, max_tokens),
            cross=caches(self.config.decoder_layers, max_tokens * self.config.queries),
            open_BPD=self.norm.weight.new_zeros(num_rows, 1, self.config.local_width),
            open_B=torch.zeros(num_rows, dtype=torch.int64, device=self.norm.weight.device),
        )

    @torch.no_grad()
    def step(
        self,
        ids_B: torch.Tensor,
        opens_B: torch.Tensor,
        closes_B: torch.Tensor,
        state: LatentState,
        active_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LatentState]:
        """One token per row -> `logits_BV` for the next, and the new state (spec 2, 6.5).

        Rows not active are left alone and give zeros. The global transformer runs for the rows whose unit closes only.
        Raises ValueError when a token continues a unit that is closed.
        """
        if active_B is None:
            active_B = torch.ones_like(opens_B)
        plan = Extension.plan(state.local, active_B.long(), 1, self.local.rope, self.config.window)
        if plan is None:
            return self.head.weight.new_zeros(len(ids_B), self.config.vocab_size), state
        x_N1D = self.embedding(ids_B if plan.rows_N is None else ids_B[plan.rows_N])[:, None]
        for i, block in enumerate(self.encoder):
            assert isinstance(block, LlamaBlock)
            x_N1D = block.extend(x_N1D, i, state.local, plan)
        state = self._close(active_B & opens_B & (state.open_B > 0), state)
        state = _append_to_open(x_N1D[:, 0], opens_B, active_B, state)
        state = self._close(active_B & closes_B, state)
        x_N1D = self._decode(x_N1D, state, plan)
        logits_BV = self.head(self.norm(x_N1D[:, 0]))
        if plan.rows_N is not None:
            logits_BV = logits_BV.new_zeros(len(ids_B), logits_BV.shape[1]).index_copy(0, plan.rows_N, logits_BV)
        return logits_BV, replace(state, local=state.local.advance(active_B.long()))

    def _close(self, rows_B: torch.Tensor, state: LatentState) -> LatentState:
        """The open unit of these rows is complete: run it through the global transformer, show it to the decoder."""
        rows_N = rows_B.nonzero()[:, 0]
        if len(rows_N) == 0:
            return state
        num_N = state.open_B[rows_N]
        longest = int(num_N.max())
        valid_NP = torch.arange(longest, device=num_N.device) < num_N[:, None]
        z_ND = self.to_global(self.unit_encoder.over(state.open_BPD[rows_N, :longest], valid_NP))
        z_BD = z_ND.new_zeros(len(rows_B), z_ND.shape[1]).index_copy(0, rows_N, z_ND)
        g_BD, global_state = self.global_.step(z_BD, state.global_, rows_B)
        k = self.config.queries
        key_NkD = self.from_global(g_BD[rows_N]).view(len(rows_N), k, -1)
        slot_Nk = state.cross.length_B[rows_N, None] + torch.arange(k, device=rows_N.device)
        for i, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderLayer)
            keys, values = layer.cross.keys_values(key_NkD)
            write_cache(state.cross.k_LBSHK[i], rows_N, slot_Nk, keys)
            write_cache(state.cross.v_LBSHK[i], rows_N, slot_Nk, values)
        return replace(
            state,
            global_=global_state,
            cross=state.cross.advance(k * rows_B.long()),
            open_B=state.open_B.masked_fill(rows_B, 0),
        )

    def _decode(self, x_N1D: torch.Tensor, state: LatentState, plan: Extension) -> torch.Tensor:
        """The decoder layers for one new token per row; every closed unit is visible, the last `window` of them."""
        visible_N = state.cross.length_B if plan.rows_N is None else state.cross.length_B[plan.rows_N]
        reach = self.config.window * self.config.queries
        start, stop = max(0, int(visible_N.min()) - reach), max(1, int(visible_N.max()))
        index_S = torch.arange(start, stop, device=visible_N.device)
        mask_N1S = ((index_S < visible_N[:, None]) & (index_S >= visible_N[:, None] - reach))[:, None]
        for i, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderLayer)
            keys = read_cache(state.cross.k_LBSHK[i], plan.rows_N, start, stop)
            values = read_cache(state.cross.v_LBSHK[i], plan.rows_N, start, stop)
            x_N1D = layer.cross(x_N1D, keys, values, mask_N1S)
            x_N1D = layer.block.extend(x_N1D, self.config.encoder_layers + i, state.local, plan)
        return x_N1D


def _append_to_open(
    h_ND: torch.Tensor, opens_B: torch.Tensor, active_B: torch.Tensor, state: LatentState
) -> LatentState:
    """The active rows' new token joins their open unit; the buffer doubles when a unit outgrows it."""
    if bool((active_B & ~opens_B & (state.open_B == 0)).any()):
        raise ValueError("a token with opens=False follows a closed unit; the patcher's step must open a new one")
    rows_N = active_B.nonzero()[:, 0]
    slot_N, size = state.open_B[rows_N], state.open_BPD.shape[1]
    open_BPD = state.open_BPD
    if int(slot_N.max()) >= size:
        open_BPD = torch.cat([open_BPD, torch.zeros_like(open_BPD)], dim=1)
    open_BPD[rows_N, slot_N] = h_ND
    return replace(state, open_BPD=open_BPD, open_B=state.open_B + active_B.long())


def unit_docs(doc_BT: torch.Tensor, unit_BT: torch.Tensor, num_units: int) -> torch.Tensor:
    """Document of each unit, `[B, U]`; -1 for the slots a row does not use."""
    doc_BU = doc_BT.new_full((len(doc_BT), num_units), -1)
    return doc_BU.scatter(1, unit_BT, doc_BT)


def cross_mask(batch: Batch, doc_BU: torch.Tensor, window: int) -> torch.Tensor:
    """`mask_BTU`: token t sees the units u of its own document with visible[t] - window <= u < visible[t] (spec 2, 6.4)."""
    ahead_BTU = batch.visible_BT[:, :, None] - torch.arange(doc_BU.shape[1], device=doc_BU.device)
    return (ahead_BTU > 0) & (ahead_BTU <= window) & (batch.doc_BT[:, :, None] == doc_BU[:, None, :])
