"""FLOPs of a batch, part by part, from the shapes that real tokens and units have (spec 2, section 8), so that runs can
be compared at equal compute.

Only multiply-adds of matrices and attention are counted; a multiply-add is two FLOPs.
Trap: it counts what the model needs, causal pairs inside documents and no padding. A dense masked kernel computes more
than that, so a profiler shows more.
"""

from dataclasses import dataclass

import torch

from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.types import IGNORE, Batch

BACKWARD = 2  # times the forward pass: one product for the inputs' gradient, one for the weights'


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a batch costs compute, padding left out. Pairs are (query, key) pairs of attention within documents. With
    one stream (plain models, text through the decoder) `local` and `pooled_tokens` are all tokens, `pooled_units` all
    units."""

    tokens: int
    """Tokens of the batch."""
    units: int
    """Units that the large transformer reads; in a plain model the tokens."""
    local: int
    """Tokens that run through the local modules."""
    pooled_tokens: int
    """Tokens that are pooled into units."""
    pooled_units: int
    """Units that these are pooled into."""
    unit_pairs: int
    """Pairs of units in the large transformer."""
    local_pairs: int
    """Pairs of tokens in the local layers' self-attention."""
    visible_pairs: int
    """Pairs of a token and a unit that it may read."""


def real_tokens(batch: Batch) -> torch.Tensor:
    """bool `[B, T]`: False on padding, which is what follows the last target of a row."""
    index_T = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
    last_B = torch.where(batch.labels_BT != IGNORE, index_T + 1, -1).amax(1)
    return index_T <= last_B[:, None]


def sizes(config: PlainLMConfig | LatentLMConfig, batch: Batch) -> Sizes:
    """Count a batch for a model; windows bound how far back a query reaches."""
    real_BT, doc_BT, unit_BT = real_tokens(batch), batch.doc_BT, batch.unit_BT
    starts_BT = torch.ones_like(real_BT)
    starts_BT[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    index_BT = torch.arange(doc_BT.shape[1], device=doc_BT.device).expand_as(doc_BT)
    first_token_BT = torch.where(starts_BT, index_BT, 0).cummax(1).values
    opens_BT = real_BT if batch.opens_BT is None else real_BT & batch.opens_BT
    local_BT, pooled_BT = real_BT, real_BT
    unit_window, local_window, visible_window = None, None, None
    if isinstance(config, LatentLMConfig):
        local_BT = real_BT & config.is_local(batch.ids_BT)
        pooled_BT = real_BT & config.is_pooled(batch.ids_BT)
        unit_window, local_window, visible_window = config.global_.window, config.window, config.window
    else:
        unit_BT, opens_BT, unit_window = index_BT, real_BT, config.llama.window
    first_unit_BT = unit_BT.gather(1, first_token_BT)
    place_BT = local_BT.long().cumsum(1)  # in the local stream, counted from 1
    before_BT = (place_BT - local_BT.long()).gather(1, first_token_BT)  # local tokens of earlier documents

    def pairs(seen_BT: torch.Tensor, of_BT: torch.Tensor, window: int | None) -> int:
        seen_BT = seen_BT if window is None else seen_BT.clamp(max=window)
        return int(seen_BT[of_BT].sum())

    return Sizes(
        tokens=int(real_BT.sum()),
        units=int(opens_BT.sum()),
        local=int(local_BT.sum()),
        pooled_tokens=int(pooled_BT.sum()),
        pooled_units=int((pooled_BT & opens_BT).sum()),
        unit_pairs=pairs(unit_BT - first_unit_BT + 1, opens_BT, unit_window),
        local_pairs=pairs(place_BT - before_BT, local_BT, local_window),
        visible_pairs=pairs(batch.visible_BT - first_unit_BT, local_BT, visible_window),
    )


def training_flops(config: PlainLMConfig | LatentLMConfig, batch: Batch) -> float:
    """FLOPs of forward and backward over the real tokens and units of one batch."""
    return (1 + BACKWARD) * sum(forward_flops(config, sizes(config, batch)).values())


def forward_flops(config: PlainLMConfig | LatentLMConfig, size: Sizes) -> dict[str, float]:
    """Part -> FLOPs of one forward pass.

    "global": the large transformer; "local": blocks of encoder and decoder; "cross": pooling, the maps between the two
    widths and all cross-attention; "heads": next-token logits.
    """
    if isinstance(config, PlainLMConfig):
        return {
            "global": _stack(config.llama, size.tokens, size.unit_pairs),
            "heads": 2 * config.vocab_size * config.llama.width * size.tokens,
        }
    local_ids = config.vocab_size - config.first_local_id
    text_head = config.num_global_ids * config.global_.width * (size.tokens - size.local)
    return {
        "global": _stack(config.global_, size.units, size.unit_pairs),
        "local": _stack(config.local, size.local, size.local_pairs),
        "cross": _cross(config, size),
        "heads": 2 * (local_ids * config.local_width * size.local + text_head),
    }


def _stack(config: LlamaConfig, positions: int, pairs: int) -> int:
    """2 FLOPs per weight and position; scores and weighted sums take 4 x (width of all heads) per pair and layer."""
    q_width, kv_width = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    weights = config.width * (2 * q_width + 2 * kv_width + 3 * config.ffn_width)
    return config.num_layers * (2 * weights * positions + 4 * q_width * pairs)


def _cross(config: LatentLMConfig, size: Sizes) -> int:
    d, k, layers = config.local_width, config.queries, config.decoder_layers
    unit_width = k * d
    per_local = 2 * d**2 * layers  # queries and outputs of the decoder's cross-attention
    per_pooled_token = 2 * d**2  # keys and values
    per_pooled_unit = d * unit_width + 2 * k * d**2  # pooled vector to queries, their attention's input and output maps
    if unit_width != config.global_.width:
        per_pooled_unit += unit_width * config.global_.width
    per_unit = config.global_.width * unit_width + 2 * k * d**2 * layers  # what the decoder reads of it
    # A token is read by the k queries of its unit.
    attention = 4 * d * k * (size.pooled_tokens + layers * size.visible_pairs)
    maps = per_pooled_token * size.pooled_tokens + per_pooled_unit * size.pooled_units
    return 2 * (per_local * size.local + maps + per_unit * size.units) + attention


# Tokens of the paper's mixture: one part interleaved (0.77 speech, 0.23 text), two parts text (Table 13).
PAPER_SPEECH, PAPER_TEXT = 0.77, 2.23


def paper_units(patch: int) -> float:
    """Units of the paper's mixture per 3.00 of its tokens: 3.00 without patches, 2.42 at 4 (spec 2, section 8)."""
    return PAPER_SPEECH / patch + PAPER_TEXT


def paper_row(config: PlainLMConfig | LatentLMConfig, patch: int, units: int = 4096) -> Sizes:
    """One row full of the paper's mixture, counted as one document without markers or short last patches."""
    tokens = units * (PAPER_SPEECH + PAPER_TEXT) / paper_units(patch)
    local, pooled_units, window, visible = tokens, float(units), None, None
    if isinstance(config, LatentLMConfig):
        window = visible = config.window
        if config.bypass:
            local = tokens * PAPER_SPEECH / (PAPER_SPEECH + PAPER_TEXT)
            pooled_units = local / patch
    return Sizes(
        tokens=round(tokens),
        units=units,
        local=round(local),
        pooled_tokens=round(local),
        pooled_units=round(pooled_units),
        unit_pairs=round(_causal_pairs(units, None)),
        local_pairs=round(_causal_pairs(local, window)),
        visible_pairs=round(_causal_pairs(units, visible) * local / units),
    )


def _causal_pairs(n: float, window: int | None) -> float:
    """Queries 1..n, each reading all up to itself, or the last `window`."""
    if window is None or n <= window:
        return n * (n + 1) / 2
    return window * n - window * (window - 1) / 2
