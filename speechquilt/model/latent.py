"""The latent speech-text model: patch encoder, global transformer over units, patch decoder (spec 2, 6).

The two booleans of a Batch say what a unit is and when its global output may be read. Without them every token is a
unit.

Two ways for text (`text_path`). "decoder": one stream, every token goes through the local modules, as the paper's
patcher does. "bypass": text and special tokens are embedded straight into the global transformer and predicted from its
output; only speech spans, from their marker on, run through the local modules. It costs less, and the global
transformer with `text_embedding` and `text_head` is an ordinary text LM, so that a pretrained one can take its place
(`warm_start`).

Trap: the prediction at t reads the global outputs of complete units only (those below `visible_BT[t]`). Inside an open
patch the unit of t itself is not among them. `step` mirrors this: a unit runs through the global transformer when it
closes, or, a short patch, when the next token opens another unit.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from speechquilt.model.local import DecoderLayer, UnitEncoder
from speechquilt.nn.attention import (
    Extension,
    KVState,
    Mask,
    MaskRule,
    build_mask,
    causal_mask,
    read_cache,
    write_cache,
)
from speechquilt.nn.batching import valid_places
from speechquilt.nn.llama import LlamaBlock, LlamaConfig, LlamaStack, init_weights
from speechquilt.types import Batch
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class LatentLMConfig:
    """The latent speech-text model: a small local encoder pools the tokens of a unit (a patch of speech, or one text
    token), a large global transformer reads units, and a small local decoder predicts tokens."""

    vocab_size: int
    """Ids of the vocabulary: text, special and speech tokens. 0: not known yet; a run takes it from its tokenizers."""
    global_: LlamaConfig
    """Sizes of the global transformer, which holds most of the parameters."""
    local_width: int
    """Numbers per token in the local encoder and decoder. Must be a multiple of `local_heads`; usually half the global
    width."""
    encoder_layers: int
    """Transformer layers of the local encoder."""
    decoder_layers: int
    """Transformer layers of the local decoder; each reads the global transformer's outputs."""
    local_heads: int
    """Attention heads of each local layer."""
    local_ffn: int
    """Width inside the feed-forward part of each local layer."""
    queries: int = 2
    """Vectors of local width that a unit is pooled into. More: less of a patch is lost, and wider maps between the
    local modules and the global transformer."""
    window: int = 512
    """How far back the local layers attend: this many tokens in self-attention, this many units in the attention to the
    global transformer's outputs."""
    text_path: Literal["decoder", "bypass"] = "decoder"
    """How text takes part. "decoder": every token goes through the local encoder and decoder, as in the paper.
    "bypass": text goes straight into the global transformer and is predicted from its output, which costs less and lets
    a pretrained text model take that place."""
    num_text: int = 0
    """Ids of the text tokenizer, which come first in the vocabulary. 0: not known yet; a run takes it from its
    tokenizer. Only `text_path` "bypass" needs it."""

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

    @property
    def bypass(self) -> bool:
        return self.text_path == "bypass"

    @property
    def num_global_ids(self) -> int:
        """Ids that the global transformer reads and predicts itself: text and specials, or none."""
        return self._offsets.speech_start if self.bypass else 0

    @property
    def first_local_id(self) -> int:
        """Ids from here on have a row in the local embedding and head."""
        return self.num_text if self.bypass else 0

    @property
    def speech_marker(self) -> int:
        return self._offsets.marker("speech")

    @property
    def _offsets(self) -> Vocab:
        return Vocab(num_text=self.num_text, num_speech=0)

    def is_pooled(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids reach the global transformer as part of a pooled unit, not by an embedding of their own."""
        return ids >= self.num_global_ids

    def is_local(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids run through the local modules: with the bypass speech and its marker, else all."""
        return self.is_pooled(ids) | (ids == self.speech_marker)

    def for_vocab(self, vocab: Vocab) -> "LatentLMConfig":
        """The same model with the sizes of this vocabulary."""
        return replace(self, vocab_size=vocab.size, num_text=vocab.num_text)

    def build(self, seed: int = 0) -> "LatentLM":
        """Raises ValueError when a size is missing."""
        if self.vocab_size <= self.num_global_ids:
            raise ValueError(
                f"vocab_size={self.vocab_size} must exceed the {self.num_global_ids} text and special ids; "
                "take both from the vocabulary with for_vocab"
            )
        model = LatentLM(self)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model


@dataclass(frozen=True, kw_only=True)
class LocalStream:
    """The tokens of a batch that run through the local modules, L per row, in order.

    `index_BL`: their places in the row, T for the slots that a row does not use; None = the whole row. `ids_BL`: rows
    of the local embedding; `unit_BL`: the unit a token is pooled into, U for none; `visible_BL`: as in `Batch`.
    """

    index_BL: torch.Tensor | None
    ids_BL: torch.Tensor
    doc_BL: torch.Tensor
    unit_BL: torch.Tensor
    visible_BL: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class LatentState:
    """Incremental state, one document per row. Caches are written in place (see `KVState`).

    `local`: self-attention of the encoder layers, then of the decoder layers; `global_`: counted in units; `cross`:
    what the decoder layers read, k entries per unit; `open_BPD`, `open_B`: encoder states of the open unit and their
    number.
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
        width, unit_width = config.global_.width, config.queries * config.local_width
        num_local_ids = config.vocab_size - config.first_local_id
        if config.bypass:
            self.text_embedding = nn.Embedding(config.num_global_ids, width)
            self.text_head = nn.Linear(width, config.num_global_ids, bias=False)
        self.embedding = nn.Embedding(num_local_ids, config.local_width)
        self.encoder = nn.ModuleList(LlamaBlock(self.local) for _ in range(config.encoder_layers))
        self.unit_encoder = UnitEncoder(self.local, config.queries)
        self.to_global = nn.Identity() if unit_width == width else nn.Linear(unit_width, width, False)
        self.global_ = LlamaStack(config.global_)
        self.from_global = nn.Linear(width, unit_width, bias=False)
        self.decoder = nn.ModuleList(DecoderLayer(self.local) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(config.local_width, eps=config.global_.norm_eps)
        self.head = nn.Linear(config.local_width, num_local_ids, bias=False)

    def blocks(self) -> list[nn.Module]:
        """The parts that a trainer shards, compiles and recomputes one by one."""
        return [*self.encoder, *self.global_.layers, *self.decoder]

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> `logits_BTV`.

        With the text bypass, ids that cannot follow (speech after text without a marker, text within speech) get -inf.
        """
        x_BLD, g_BUD, index_BL = self._outputs(batch)
        logits_BLV = self.head(x_BLD)
        return logits_BLV if index_BL is None else self._place_logits(logits_BLV, g_BUD, index_BL, batch)

    def logits_at(self, batch: Batch, wanted_BT: torch.Tensor) -> torch.Tensor:
        """-> `logits_NV` at the N places where bool `wanted_BT` is True, in row order; as `forward`'s there."""
        x_BLD, g_BUD, index_BL = self._outputs(batch)
        if index_BL is None:
            return self.head(x_BLD[wanted_BT])
        row_N, place_N = wanted_BT.nonzero(as_tuple=True)
        local_BT = self.config.is_local(batch.ids_BT)
        local_N, slot_N = local_BT[row_N, place_N], (local_BT.long().cumsum(1) - 1)[row_N, place_N]
        speech_NV = self.head(x_BLD[row_N[local_N], slot_N[local_N]])
        text_NV = self.text_head(g_BUD[row_N[~local_N], batch.unit_BT[row_N[~local_N], place_N[~local_N]]])
        out_NV = text_NV.new_full((len(row_N), self.config.vocab_size), -torch.inf)
        out_NV[local_N, self.config.first_local_id :] = speech_NV.to(out_NV.dtype)
        out_NV[~local_N, : self.config.num_global_ids] = text_NV
        return out_NV

    def _outputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the heads read: of the local decoder `x_BLD`, of the global transformer `g_BUD`; with `LocalStream.index_BL`.

        Masks and RoPE tables are made once and shared by all layers.
        """
        num_units = batch.num_units or int(batch.unit_BT[:, -1].max()) + 1
        stream = self._stream(batch, num_units)
        mask = causal_mask(stream.doc_BL, self.config.window)
        rope = self.local.rope(torch.arange(stream.ids_BL.shape[1], device=stream.ids_BL.device)[None])
        x_BLD = self.embedding(stream.ids_BL)
        for block in self.encoder:
            x_BLD = block(x_BLD, mask, rope)
        doc_BU = unit_docs(batch.doc_BT, batch.unit_BT, num_units)
        g_BUD = self.global_(self._unit_vectors(x_BLD, stream, batch, num_units), self.global_.mask(doc_BU))
        units_BSD = self.from_global(g_BUD).view(len(g_BUD), -1, self.config.local_width)
        across = cross_mask(stream, doc_BU, self.config.queries, self.config.window)
        for layer in self.decoder:
            x_BLD = layer(x_BLD, units_BSD, across, mask, rope)
        return self.norm(x_BLD), g_BUD, stream.index_BL

    def _stream(self, batch: Batch, num_units: int) -> LocalStream:
        """The whole row, or with the bypass its speech spans closed up."""
        if not self.config.bypass:
            return LocalStream(
                index_BL=None,
                ids_BL=batch.ids_BT,
                doc_BL=batch.doc_BT,
                unit_BL=batch.unit_BT,
                visible_BL=batch.visible_BT,
            )
        local_BT = self.config.is_local(batch.ids_BT)
        num_local = batch.num_local or max(1, int(local_BT.sum(1).max()))
        B, T = local_BT.shape
        slot_BT = torch.where(local_BT, local_BT.long().cumsum(1) - 1, num_local)
        place_BT = torch.arange(T, device=local_BT.device).expand(B, T)
        index_BL = place_BT.new_full((B, num_local + 1), T).scatter(1, slot_BT, place_BT)[:, :num_local]
        used_BL = index_BL < T

        def pick(x_BT: torch.Tensor, unused: int) -> torch.Tensor:
            return torch.where(used_BL, x_BT.gather(1, index_BL.clamp(max=T - 1)), unused)

        ids_BL = pick(batch.ids_BT, self.config.speech_marker)
        return LocalStream(
            index_BL=index_BL,
            ids_BL=ids_BL - self.config.first_local_id,
            doc_BL=pick(batch.doc_BT, T),  # of no unit's document, so unused slots read no unit
            unit_BL=torch.where(self.config.is_pooled(ids_BL), pick(batch.unit_BT, num_units), num_units),
            visible_BL=pick(batch.visible_BT, 0),
        )

    def _unit_vectors(self, h_BLD: torch.Tensor, stream: LocalStream, batch: Batch, num_units: int) -> torch.Tensor:
        """Encoder states -> what the global transformer reads, `[B, U, global width]`."""
        B, slots = len(h_BLD), num_units + 1  # the last slot of a row collects what is pooled into no unit
        flat_M = (stream.unit_BL + slots * torch.arange(B, device=h_BLD.device)[:, None]).flatten()
        z_BUD = self.to_global(self.unit_encoder(h_BLD.flatten(0, 1), flat_M, B * slots)).view(B, slots, -1)[:, :-1]
        if not self.config.bypass:
            return z_BUD
        ids_BU = batch.ids_BT.new_zeros(B, num_units).scatter(1, batch.unit_BT, batch.ids_BT)
        pooled_BU = self.config.is_pooled(ids_BU)
        text_BUD = self.text_embedding(ids_BU.masked_fill(pooled_BU, 0))
        return torch.where(pooled_BU[..., None], z_BUD, text_BUD.to(z_BUD.dtype))

    def _place_logits(
        self, logits_BLV: torch.Tensor, g_BUD: torch.Tensor, index_BL: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """Local logits at the tokens of speech spans, those of the global outputs at all others: `[B, T, V]`."""
        B, T = batch.ids_BT.shape
        row_B1 = torch.arange(B, device=index_BL.device)[:, None]
        place_BT = torch.where(self.config.is_local(batch.ids_BT), T, torch.arange(T, device=index_BL.device))
        place_BU = place_BT.new_full(g_BUD.shape[:2], T).scatter_reduce(1, batch.unit_BT, place_BT, "amin")
        text_BUV = self.text_head(g_BUD)
        out_BTV = text_BUV.new_full((B, T + 1, self.config.vocab_size), -torch.inf)  # slot T takes what has no place
        out_BTV[row_B1, place_BU, : self.config.num_global_ids] = text_BUV
        out_BTV[row_B1, index_BL, self.config.first_local_id :] = logits_BLV.to(out_BTV.dtype)
        return out_BTV[:, :T]

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
        pooled_B, local_B = active_B & self.config.is_pooled(ids_B), active_B & self.config.is_local(ids_B)
        state = self._close(active_B & opens_B & (state.open_B > 0), state)
        logits_BV = self.head.weight.new_zeros(len(ids_B), self.config.vocab_size)
        if self.config.bypass:
            logits_BV = logits_BV.masked_fill(active_B[:, None], -torch.inf)
            state = self._step_text(ids_B, active_B & ~pooled_B, logits_BV, state)
        plan = Extension.plan(state.local, local_B.long(), 1, self.local.rope, self.config.window)
        if plan is None:
            return logits_BV, state
        rows_N = torch.arange(len(ids_B), device=ids_B.device) if plan.rows_N is None else plan.rows_N
        x_N1D = self.embedding(ids_B[rows_N] - self.config.first_local_id)[:, None]
        for i, block in enumerate(self.encoder):
            assert isinstance(block, LlamaBlock)
            x_N1D = block.extend(x_N1D, i, state.local, plan)
        state = _append_to_open(x_N1D[pooled_B[rows_N], 0], opens_B, pooled_B, state)
        state = self._close(pooled_B & closes_B, state)
        x_N1D = self._decode(x_N1D, state, plan)
        logits_BV[rows_N, self.config.first_local_id :] = self.head(self.norm(x_N1D[:, 0])).to(logits_BV.dtype)
        return logits_BV, replace(state, local=state.local.advance(local_B.long()))

    def _step_text(
        self, ids_B: torch.Tensor, rows_B: torch.Tensor, logits_BV: torch.Tensor, state: LatentState
    ) -> LatentState:
        """Text and special tokens of the bypass: each is a unit; `logits_BV` of those rows is filled in place."""
        if not bool(rows_B.any()):
            return state
        z_BD = self.text_embedding(ids_B.masked_fill(~rows_B, 0))
        g_BD, state = self._run_units(z_BD, rows_B, state)
        logits_BV[rows_B, : self.config.num_global_ids] = self.text_head(g_BD[rows_B]).to(logits_BV.dtype)
        speech_N = (rows_B & (ids_B == self.config.speech_marker)).nonzero()[:, 0]
        logits_BV[speech_N] = -torch.inf  # what follows a speech marker is predicted by the local decoder, in `step`
        return state

    def _close(self, rows_B: torch.Tensor, state: LatentState) -> LatentState:
        """The open unit of these rows is complete: run it through the global transformer, show it to the decoder."""
        rows_N = rows_B.nonzero()[:, 0]
        if len(rows_N) == 0:
            return state
        num_N = state.open_B[rows_N]
        longest = int(num_N.max())
        valid_NP = valid_places(num_N, longest)
        z_ND = self.to_global(self.unit_encoder.over(state.open_BPD[rows_N, :longest], valid_NP))
        z_BD = z_ND.new_zeros(len(rows_B), z_ND.shape[1]).index_copy(0, rows_N, z_ND)
        return self._run_units(z_BD, rows_B, replace(state, open_B=state.open_B.masked_fill(rows_B, 0)))[1]

    def _run_units(
        self, z_BD: torch.Tensor, rows_B: torch.Tensor, state: LatentState
    ) -> tuple[torch.Tensor, LatentState]:
        """One unit of each of these rows through the global transformer -> its outputs; the decoder may read them."""
        rows_N = rows_B.nonzero()[:, 0]
        g_BD, global_state = self.global_.step(z_BD, state.global_, rows_B)
        k = self.config.queries
        key_NkD = self.from_global(g_BD[rows_N]).view(len(rows_N), k, -1)
        slot_Nk = state.cross.length_B[rows_N, None] + torch.arange(k, device=rows_N.device)
        for i, layer in enumerate(self.decoder):
            assert isinstance(layer, DecoderLayer)
            keys, values = layer.cross.keys_values(key_NkD)
            write_cache(state.cross.k_LBSHK[i], rows_N, slot_Nk, keys)
            write_cache(state.cross.v_LBSHK[i], rows_N, slot_Nk, values)
        return g_BD, replace(state, global_=global_state, cross=state.cross.advance(k * rows_B.long()))

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


def _append_to_open(h_ND: torch.Tensor, opens_B: torch.Tensor, rows_B: torch.Tensor, state: LatentState) -> LatentState:
    """The new token of these rows (N of them) joins their open unit; the buffer doubles when a unit outgrows it."""
    if bool((rows_B & ~opens_B & (state.open_B == 0)).any()):
        raise ValueError("a token with opens=False follows a closed unit; the patcher's step must open a new one")
    rows_N = rows_B.nonzero()[:, 0]
    if len(rows_N) == 0:
        return state
    slot_N, size = state.open_B[rows_N], state.open_BPD.shape[1]
    open_BPD = state.open_BPD
    if int(slot_N.max()) >= size:
        open_BPD = torch.cat([open_BPD, torch.zeros_like(open_BPD)], dim=1)
    open_BPD[rows_N, slot_N] = h_ND
    return replace(state, open_BPD=open_BPD, open_B=state.open_B + rows_B.long())


def unit_docs(doc_BT: torch.Tensor, unit_BT: torch.Tensor, num_units: int) -> torch.Tensor:
    """Document of each unit, `[B, U]`; -1 for the slots a row does not use."""
    doc_BU = doc_BT.new_full((len(doc_BT), num_units), -1)
    return doc_BU.scatter(1, unit_BT, doc_BT)


def cross_rule(stream: LocalStream, doc_BU: torch.Tensor, queries: int, window: int) -> MaskRule:
    """Token t sees the k vectors of those units u of its own document with visible[t] - window <= u < visible[t]
    (spec 2, 6.4)."""

    def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        unit = kv // queries
        ahead = stream.visible_BL[b, q] - unit
        return (ahead > 0) & (ahead <= window) & (stream.doc_BL[b, q] == doc_BU[b, unit])

    return rule


def cross_mask(stream: LocalStream, doc_BU: torch.Tensor, queries: int, window: int) -> Mask:
    """`cross_rule` over all tokens and unit vectors of a batch."""
    return build_mask(
        cross_rule(stream, doc_BU, queries, window),
        num_rows=len(doc_BU),
        num_queries=stream.ids_BL.shape[1],
        num_keys=queries * doc_BU.shape[1],
        device=doc_BU.device,
    )
