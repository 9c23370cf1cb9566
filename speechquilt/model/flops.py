"""Training FLOPs of one batch, from the shapes that real tokens and units have (spec 2, section 8).

Place in the pipeline: objectives log it, so that runs can be compared at equal compute.
Trap: it counts what the model needs, causal pairs inside documents and no padding, not what a dense masked kernel spends
on the way; a profiler shows more. Multiply-adds of matrices and attention only, a multiply-add is two FLOPs.
"""

from dataclasses import dataclass

import torch

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.lm import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import IGNORE, Batch


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a batch costs compute, padding left out; pairs are (query, key) pairs within documents."""

    tokens: int
    units: int
    token_pairs: int
    unit_pairs: int
    visible_pairs: int


def real_tokens(batch: Batch) -> torch.Tensor:
    """bool `[B, T]`: False on padding, which is what follows the last target of a row."""
    index_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
    last_B = torch.where(batch.labels_BT != IGNORE, index_T + 1, -1).amax(1)
    return index_T <= last_B[:, None]


def sizes(batch: Batch, token_window: int | None, unit_window: int | None, visible_window: int | None) -> Sizes:
    """Count a batch; a window bounds how far back a query reaches, None = to the document's start."""
    real_BT, doc_BT, unit_BT = real_tokens(batch), batch.doc_BT, batch.unit_BT
    starts_BT = torch.ones_like(real_BT)
    starts_BT[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    index_BT = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand_as(doc_BT)
    first_token_BT = torch.where(starts_BT, index_BT, 0).cummax(1).values
    first_unit_BT = unit_BT.gather(1, first_token_BT)
    opens_BT = real_BT if batch.opens_BT is None else real_BT & batch.opens_BT

    def pairs(seen_BT: torch.Tensor, of_BT: torch.Tensor, window: int | None) -> int:
        seen_BT = seen_BT if window is None else seen_BT.clamp(max=window)
        return int(seen_BT[of_BT].sum())

    return Sizes(
        tokens=int(real_BT.sum()),
        units=int(opens_BT.sum()),
        token_pairs=pairs(index_BT - first_token_BT + 1, real_BT, token_window),
        unit_pairs=pairs(unit_BT - first_unit_BT + 1, opens_BT, unit_window),
        visible_pairs=pairs(batch.visible_BT - first_unit_BT, real_BT, visible_window),
    )


def training_flops(config: PlainLMConfig | LatentLMConfig, batch: Batch) -> float:
    """FLOPs of forward and backward (three times forward) over the real tokens and units of one batch."""
    if isinstance(config, PlainLMConfig):
        size = sizes(batch, config.llama.window, None, None)
        head = 2 * config.vocab_size * config.llama.width * size.tokens
        return 3.0 * (head + _stack_flops(config.llama, size.tokens, size.token_pairs))
    size = sizes(batch, config.window, config.global_.window, config.window)
    return 3.0 * (_stack_flops(config.global_, size.units, size.unit_pairs) + _local_flops(config, size))


def _stack_flops(config: LlamaConfig, positions: int, pairs: int) -> int:
    """2 N per position, and scores and mixing over all pairs: 4 L d per pair."""
    kv_width = config.num_kv_heads * config.head_width
    weights = 2 * config.width**2 + 2 * config.width * kv_width + 3 * config.width * config.ffn_width
    return config.num_layers * (2 * weights * positions + 4 * config.width * pairs)


def _local_flops(config: LatentLMConfig, size: Sizes) -> int:
    """Everything but the global stack: local blocks, both cross-attentions, the linears between widths, the head."""
    d, k, layers = config.local_width, config.queries, config.decoder_layers
    unit_width = k * d
    per_token = 2 * d**2 * (1 + layers) + config.vocab_size * d  # keys and values / queries and outputs; the head
    per_unit = d * unit_width + config.global_.width * unit_width + 2 * k * d**2 * (1 + layers)
    if unit_width != config.global_.width:
        per_unit += unit_width * config.global_.width
    attention = 4 * d * k * (size.tokens + layers * size.visible_pairs)  # a token is read by the k queries of its unit
    return (
        _stack_flops(config.local, size.tokens, size.token_pairs)
        + 2 * per_token * size.tokens
        + 2 * per_unit * size.units
        + attention
    )
