"""The one place where attention is computed, the masks it takes, and the key-value state of incremental decoding.

A mask is a rule over indices, evaluated once per batch: as a block mask for FlexAttention on CUDA, as a bool tensor for
SDPA elsewhere (docs/decisions/0010-attention.md).
Trap: `KVState` is passed in and returned, but its cache tensors are written IN PLACE: an old state may not be used
again after it was extended. `length_B` alone says what is valid, so resetting a row costs nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin tables of some positions
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MaskBackend = Literal["flex", "dense"]


@dataclass(frozen=True)
class PlainCausal:
    """Each token sees all tokens up to itself: SDPA knows this mask by name and skips the half that is hidden."""


Mask = torch.Tensor | BlockMask | PlainCausal

_forced_backend: ContextVar[MaskBackend | None] = ContextVar("_forced_backend", default=None)


@contextmanager
def mask_backend(backend: MaskBackend) -> Iterator[None]:
    """Inside the block `build_mask` makes this kind of mask; outside it "flex" on CUDA and "dense" elsewhere."""
    token = _forced_backend.set(backend)
    try:
        yield
    finally:
        _forced_backend.reset(token)


def build_mask(rule: MaskRule, *, num_rows: int, num_queries: int, num_keys: int, device: torch.device | str) -> Mask:
    """Which keys each query sees, made once per batch and shared by all layers and heads.

    `rule(b, h, q, kv)` takes int64 index tensors that broadcast together and answers bool, True = may attend (the
    mask_mod of FlexAttention). It may index captured tensors with them, but not turn tensors into Python numbers, and
    it must not depend on `h`. -> bool `[B, T, S]`, or a BlockMask on CUDA.
    """
    device = torch.device(device)
    if (_forced_backend.get() or ("flex" if device.type == "cuda" else "dense")) == "flex":
        create = _for_device(create_block_mask, device)
        return create(rule, B=num_rows, H=None, Q_LEN=num_queries, KV_LEN=num_keys, device=device)
    b_B11 = torch.arange(num_rows, device=device)[:, None, None]
    q_T1 = torch.arange(num_queries, device=device)[:, None]
    kv_S = torch.arange(num_keys, device=device)
    return rule(b_B11, b_B11.new_zeros(()), q_T1, kv_S).expand(num_rows, num_queries, num_keys)


def _for_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A function of FlexAttention: compiled on CUDA; as it is elsewhere, where only tests call it."""
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first use: a machine without a GPU never pays for the compiler.

    What cannot be compiled as one graph is an error: FlexAttention outside a kernel would write out all scores. Lengths
    become dynamic when they first change; numbers that a rule captures stay constants, which the kernels need.
    """
    # Every rule is compiled anew per dtype and for fixed and changing lengths; three rules already need more variants
    # than torch's default limit of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


def causal_rule(doc_BT: torch.Tensor, window: int | None = None) -> MaskRule:
    """Token q sees the tokens of its own document up to itself, the last `window` of them when given."""

    def own_past(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (kv <= q) & (doc_BT[b, q] == doc_BT[b, kv])

    if window is None:
        return own_past
    reach = window

    def near_past(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return own_past(b, h, q, kv) & (kv > q - reach)

    return near_past


def causal_mask(doc_BT: torch.Tensor, window: int | None = None) -> Mask:
    """`causal_rule` of these packed rows as a mask `[B, T, T]`; on CPU `PlainCausal` where it says the same."""
    B, T = doc_BT.shape
    # On CUDA reading the documents' numbers would wait for the device.
    may_look = doc_BT.device.type == "cpu" and _forced_backend.get() is None
    if may_look and (window is None or window >= T) and bool((doc_BT == doc_BT[:, :1]).all()):
        return PlainCausal()
    return build_mask(causal_rule(doc_BT, window), num_rows=B, num_queries=T, num_keys=T, device=doc_BT.device)


def attend(q_BHTK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """Scaled dot-product attention -> `[B, H, T, K]`.

    `mask`: from `causal_mask` or `build_mask`, or bool `[B, T, S]` with True = may attend; None = everything. A query
    that may attend to nothing gets zeros. Keys may have fewer heads than queries (grouped-query attention): consecutive
    query heads share a key head. A BlockMask needs head width >= 16 on CUDA, and gives no gradients on CPU
    (FlexAttention has none there).
    """
    B, H, T, K = q_BHTK.shape
    groups = H // k_BHSK.shape[1]
    if isinstance(mask, BlockMask):
        flex = _for_device(flex_attention, q_BHTK.device)
        return flex(q_BHTK, k_BHSK, v_BHSK, block_mask=mask, enable_gqa=groups > 1)
    mask_B1TS = mask[:, None] if isinstance(mask, torch.Tensor) else None
    if groups > 1 and T == 1:  # decoding: fold the group into the query axis instead of copying the cache per group
        return F.scaled_dot_product_attention(
            q_BHTK.reshape(B, H // groups, groups, K), k_BHSK, v_BHSK, attn_mask=mask_B1TS
        ).reshape(B, H, 1, K)
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BHSK,
        v_BHSK,
        attn_mask=mask_B1TS,
        is_causal=isinstance(mask, PlainCausal),
        enable_gqa=groups > 1,
    )


@dataclass(frozen=True, kw_only=True)
class KVState:
    """Static caches of a stack of self-attention layers.

    `k_LBSHK`, `v_LBSHK`: layers x rows x max_tokens x key heads x head width, positions already rotated in;
    `length_B` int64: how many tokens of each row are valid. Heads come after tokens, so that the part of a row in use
    is one block of memory: on CPU attention reads it twice as fast and picking rows is five times as fast.
    """

    k_LBSHK: torch.Tensor
    v_LBSHK: torch.Tensor
    length_B: torch.Tensor

    @classmethod
    def empty(
        cls, *, num_layers: int, num_rows: int, num_kv_heads: int, max_tokens: int, head_width: int, like: torch.Tensor
    ) -> "KVState":
        """No tokens yet; device and dtype of `like`. Zeros, not garbage: a masked NaN would still spread."""
        shape = (num_layers, num_rows, max_tokens, num_kv_heads, head_width)
        return cls(
            k_LBSHK=torch.zeros(shape, dtype=like.dtype, device=like.device),
            v_LBSHK=torch.zeros(shape, dtype=like.dtype, device=like.device),
            length_B=torch.zeros(num_rows, dtype=torch.int64, device=like.device),
        )

    def reset(self, rows_B: torch.Tensor) -> "KVState":
        """The rows where bool `rows_B` is True start again with no tokens (a new sequence takes the place)."""
        return replace(self, length_B=self.length_B.masked_fill(rows_B, 0))

    def moved(self, rows: list[int], to: list[int], keep: int) -> "KVState":
        """Rows `rows` take the places `to`, in place, and the first `keep` rows remain (a view)."""
        for cache_LBSHK in (self.k_LBSHK, self.v_LBSHK):
            cache_LBSHK[:, to] = cache_LBSHK[:, rows]
        self.length_B[to] = self.length_B[rows]
        return KVState(
            k_LBSHK=self.k_LBSHK[:, :keep], v_LBSHK=self.v_LBSHK[:, :keep], length_B=self.length_B[:keep].clone()
        )

    def repeated(self, rows_R: torch.Tensor) -> "KVState":
        """Copies of these rows, a row as often as it is named: each goes on by itself."""
        return KVState(k_LBSHK=self.k_LBSHK[:, rows_R], v_LBSHK=self.v_LBSHK[:, rows_R], length_B=self.length_B[rows_R])

    def advance(self, num_B: torch.Tensor) -> "KVState":
        return replace(self, length_B=self.length_B + num_B)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What all layers share while up to T new tokens are appended to some rows (N of the state's B rows take part).

    `rows_N`: int64 indices, None when every row takes part (then nothing is gathered); `valid_NT`: bool, None when
    every token is real; `slot_NT`: the position of each token. Caches are read in `start:stop` only, and `mask_NTS`
    says which of these slots each token may see.
    """

    rows_N: torch.Tensor | None
    valid_NT: torch.Tensor | None
    slot_NT: torch.Tensor
    start: int
    stop: int
    mask_NTS: torch.Tensor
    rope: Rope

    @classmethod
    def plan(
        cls,
        state: KVState,
        num_B: torch.Tensor,
        num_new: int,
        rope: Callable[[torch.Tensor], Rope],
        window: int | None,
    ) -> "Extension | None":
        """Row b appends the first `num_B[b]` of `num_new` tokens; None when no row appends any.

        `rope`: positions -> tables. Raises ValueError when a row would outgrow its cache.
        """
        rows_N = None if bool((num_B > 0).all()) else (num_B > 0).nonzero()[:, 0]
        if rows_N is not None and len(rows_N) == 0:
            return None
        length_N = state.length_B if rows_N is None else state.length_B[rows_N]
        num_N = num_B if rows_N is None else num_B[rows_N]
        stop = int((length_N + num_N).max())
        check_room(state, stop)
        start = 0 if window is None else max(0, int(length_N.min()) - window + 1)
        new_T = torch.arange(num_new, device=num_B.device)
        ragged = num_new > 1 and bool((num_N < num_new).any())
        slot_NT = length_N[:, None] + new_T
        return cls(
            rows_N=rows_N,
            valid_NT=new_T < num_N[:, None] if ragged else None,
            slot_NT=slot_NT,
            start=start,
            stop=stop,
            mask_NTS=past_mask(slot_NT, start, stop, window),
            rope=rope(slot_NT),
        )

    @classmethod
    def plan_unseen(
        cls, state: KVState, num_new: int, rope: Callable[[torch.Tensor], Rope], window: int | None, longest: int
    ) -> "Extension":
        """All rows get `num_new` tokens, and no tensor is read: a GPU never waits for the host, nor the host for it.

        `longest`: tokens of the longest row that counts, afterwards. A row that is not to grow takes part all the same:
        what it writes lies behind its `length_B` and is overwritten by its next token, so every row needs room for
        `num_new` more.
        Raises ValueError when `longest` is more than the cache holds.
        """
        check_room(state, longest)
        slot_BT = state.length_B[:, None] + torch.arange(num_new, device=state.length_B.device)
        return cls(
            rows_N=None,
            valid_NT=None,
            slot_NT=slot_BT,
            start=0,
            stop=longest,
            mask_NTS=past_mask(slot_BT, 0, longest, window),
            rope=rope(slot_BT),
        )

    def write_and_read(
        self, state: KVState, layer: int, k_NHTK: torch.Tensor, v_NHTK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the new keys and values of one layer into the cache (in place); -> all of the rows' `[N, H, S, K]`."""
        out = []
        for cache_BSHK, new_NHTK in ((state.k_LBSHK[layer], k_NHTK), (state.v_LBSHK[layer], v_NHTK)):
            write_cache(cache_BSHK, self.rows_N, self.slot_NT, new_NHTK, self.valid_NT)
            out.append(read_cache(cache_BSHK, self.rows_N, self.start, self.stop))
        return out[0], out[1]


def check_room(state: KVState, stop: int) -> None:
    """Raises ValueError when a row of `stop` tokens does not fit."""
    max_tokens = state.k_LBSHK.shape[2]
    if stop > max_tokens:
        raise ValueError(f"max_tokens={max_tokens} is too small: a row grows to {stop} tokens; init_state with more")


def past_mask(slot_NT: torch.Tensor, start: int, stop: int, window: int | None) -> torch.Tensor:
    """Bool `[N, T, S]`: which of the slots `start:stop` the token in each slot sees."""
    back_NTS = slot_NT[:, :, None] - torch.arange(start, stop, device=slot_NT.device)
    return back_NTS >= 0 if window is None else (back_NTS >= 0) & (back_NTS < window)


def write_cache(
    cache_BSHK: torch.Tensor,
    rows_N: torch.Tensor | None,
    slot_NT: torch.Tensor,
    new_NHTK: torch.Tensor,
    valid_NT: torch.Tensor | None = None,
) -> None:
    """In place: the new entries of these rows (None = all rows) go to their slots, where valid."""
    if rows_N is None:
        rows_N = torch.arange(len(slot_NT), device=slot_NT.device)
    rows_NT = rows_N[:, None].expand_as(slot_NT)
    new_NTHK = new_NHTK.transpose(1, 2).to(cache_BSHK.dtype)  # autocast computes in less than the cache keeps
    if valid_NT is None:
        cache_BSHK[rows_NT, slot_NT] = new_NTHK
    else:
        cache_BSHK[rows_NT[valid_NT], slot_NT[valid_NT]] = new_NTHK[valid_NT]


def read_cache(cache_BSHK: torch.Tensor, rows_N: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
    """`[N, H, S, K]`: slots `start:stop` of these rows; a view when `rows_N` is None."""
    read_BSHK = cache_BSHK[:, start:stop]
    return (read_BSHK if rows_N is None else read_BSHK.index_select(0, rows_N)).transpose(1, 2)
