"""The one place where attention is computed, the masks it takes, and the key-value state of incremental decoding.

Place in the pipeline: layer 1, under every transformer here.
Trap: `KVState` is passed in and returned, but its cache tensors are written IN PLACE: an old state may not be used again
after it was extended. `length_B` alone says what is valid, so resetting a row costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin tables of some positions


def attend(
    q_BHTK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSK: torch.Tensor, mask_BTS: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot-product attention -> `[B, H, T, K]`.

    `mask_BTS` is bool, True = may attend; None = everything. A query that may attend to nothing gets zeros. Keys may
    have fewer heads than queries (grouped-query attention): consecutive query heads share a key head.
    """
    B, H, T, K = q_BHTK.shape
    groups = H // k_BHSK.shape[1]
    mask = None if mask_BTS is None else mask_BTS[:, None]
    if groups > 1 and T == 1:  # decoding: fold the group into the query axis instead of copying the cache per group
        return F.scaled_dot_product_attention(
            q_BHTK.reshape(B, H // groups, groups, K), k_BHSK, v_BHSK, attn_mask=mask
        ).reshape(B, H, 1, K)
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=mask, enable_gqa=groups > 1)


def causal_mask(doc_BT: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """`mask_BTT`: token t sees the tokens of its own document up to itself, the last `window` of them when given."""
    index_T = torch.arange(doc_BT.shape[1], device=doc_BT.device)
    back_TT = index_T[:, None] - index_T[None, :]
    near_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    return near_TT & (doc_BT[:, :, None] == doc_BT[:, None, :])


@dataclass(frozen=True, kw_only=True)
class KVState:
    """Static caches of a stack of self-attention layers.

    `k_LBSHK`, `v_LBSHK`: layers x rows x max_tokens x key heads x head width, positions already rotated in;
    `length_B` int64: how many tokens of each row are valid. Heads come after tokens, so that the part of a row in use is
    one block of memory: on CPU attention reads it twice as fast and picking rows is five times as fast.
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

    def advance(self, num_B: torch.Tensor) -> "KVState":
        return replace(self, length_B=self.length_B + num_B)


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What all layers share while up to T new tokens are appended to some rows (N of the state's B rows take part).

    `rows_N` int64 indices, or None when every row takes part (no gather needed); `valid_NT` bool, or None when every
    token is real; `slot_NT` the position of each token; caches are read in `start:stop` only; `mask_NTS` over them.
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
        """Row b appends the first `num_B[b]` of `num_new` tokens; None when no row appends any. `rope`: positions -> tables.

        Raises ValueError when a row would outgrow its cache.
        """
        rows_N = None if bool((num_B > 0).all()) else (num_B > 0).nonzero()[:, 0]
        if rows_N is not None and len(rows_N) == 0:
            return None
        length_N = state.length_B if rows_N is None else state.length_B[rows_N]
        num_N = num_B if rows_N is None else num_B[rows_N]
        stop, max_tokens = int((length_N + num_N).max()), state.k_LBSHK.shape[2]
        if stop > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is too small: a row grows to {stop} tokens; init_state with more"
            )
        start = 0 if window is None else max(0, int(length_N.min()) - window + 1)
        new_T = torch.arange(num_new, device=num_B.device)
        slot_NT = length_N[:, None] + new_T
        back_NTS = slot_NT[:, :, None] - torch.arange(start, stop, device=num_B.device)
        ragged = num_new > 1 and bool((num_N < num_new).any())
        return cls(
            rows_N=rows_N,
            valid_NT=new_T < num_N[:, None] if ragged else None,
            slot_NT=slot_NT,
            start=start,
            stop=stop,
            mask_NTS=back_NTS >= 0 if window is None else (back_NTS >= 0) & (back_NTS < window),
            rope=rope(slot_NT),
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
