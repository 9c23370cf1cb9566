"""Rows of speech ids as a trained map of the tokenizer's codebook: codes that sound alike begin, and learn, alike.

A code is rare: with 16,384 of them a few hours of speech hold each some ten times, too seldom for a row of its own in
the embedding and another in the head (docs/decisions/0022-codebook-rows.md). So a row here is a free part, zero at first,
plus a linear map of the code's vector, which learns from every token.
Trap: the maps live while the model trains. `fold` adds them into the weights, and only then are those a plain
`LlamaForCausalLM`; saving earlier would lose the maps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from speechquilt.text_to_token.network import TextToTokenLM

Table = nn.Embedding | nn.Linear  # a row of weights per id


class CodebookRows(nn.Module):
    """`weight_VD` -> the same plus the map of codebook [K, C] in the K rows from `first` on; its rows begin with a mean
    square of `std` squared."""

    features_KF: Tensor

    def __init__(self, codebook_KC: Tensor, width: int, first: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        features_KF = features(codebook_KC)
        self.first = first
        self.register_buffer("features_KF", features_KF, persistent=False)  # the tokenizer's, not this run's
        num_features = features_KF.shape[1]
        self.map_FD = nn.Parameter(torch.randn(num_features, width, generator=generator) * std * num_features**-0.5)

    def forward(self, weight_VD: Tensor) -> Tensor:
        last = self.first + len(self.features_KF)
        rows_KD = weight_VD[self.first : last] + self.features_KF @ self.map_FD
        return torch.cat([weight_VD[: self.first], rows_KD, weight_VD[last:]])


def features(codebook_KC: Tensor) -> Tensor:
    """Codebook [K, C] -> `features_KF`: vectors around their mean, and their squared length, with mean squares near 1.

    With the squared length a linear map can favour the codes near a point: |x - c|^2 is linear in (c, |c|^2). Raises
    ValueError for codes that are all the same.
    """
    centred_KC = codebook_KC.float() - codebook_KC.float().mean(0)
    square_K1 = centred_KC.square().sum(1, keepdim=True)
    if not square_K1.any():
        raise ValueError("all codes of the codebook are the same; train the speech tokenizer first")
    length_K1 = (square_K1 - square_K1.mean()) / square_K1.std().clamp(min=1e-6 * float(square_K1.mean()))
    return torch.cat([centred_KC / centred_KC.square().mean().sqrt(), length_K1], 1)


def attach(model: TextToTokenLM, codebook_KC: Tensor, seed: int = 0) -> None:
    """Let the rows of speech in embedding and head be maps of the codebook until `fold`; their free part begins at zero.

    Raises ValueError when the codebook has another number of codes than the model.
    """
    vocab = model.vocab
    if len(codebook_KC) != vocab.num_speech:
        raise ValueError(
            f"the codebook has {len(codebook_KC)} codes and the model {vocab.num_speech} speech ids; "
            "give the codebook of the tokenizer whose tokens it writes"
        )
    generator = torch.Generator().manual_seed(seed)
    width = model.config.llama.width
    # The spreads of `init_weights`: 1 in the embedding, width^-0.5 in the head.
    for table, std in ((model.model.embed_tokens, 1.0), (model.lm_head, width**-0.5)):
        nothing_D = table.weight.new_zeros(width)
        _attach(table, CodebookRows(codebook_KC.to(nothing_D), width, vocab.speech_start, std, generator), nothing_D)


def attach_to(tables: Sequence[Table], first: int, codebook_KC: Tensor, seed: int = 0) -> None:
    """The same for `tables` of any model, whose rows from `first` on are those of the codes, in order.

    Their free part begins as the mean of what the rows were and the map with their spread, so they enter the model as they
    would have. Raises ValueError when a table ends before its codes do.
    """
    generator = torch.Generator().manual_seed(seed)
    for table in tables:
        rows_KD = table.weight.detach()[first : first + len(codebook_KC)]
        if len(rows_KD) != len(codebook_KC):
            raise ValueError(
                f"the codebook has {len(codebook_KC)} codes and the model {len(rows_KD)} rows for speech; "
                "give the codebook of the tokenizer whose tokens it reads"
            )
        mean_D = rows_KD.mean(0)
        spread = float((rows_KD - mean_D).square().mean().sqrt())
        rows = CodebookRows(codebook_KC.to(rows_KD), rows_KD.shape[1], first, spread, generator)
        _attach(table, rows, mean_D)


def _attach(table: Table, rows: CodebookRows, free_D: Tensor) -> None:
    with torch.no_grad():
        table.weight[rows.first : rows.first + len(rows.features_KF)] = free_D
    parametrize.register_parametrization(table, "weight", rows)


def fold(model: TextToTokenLM) -> None:
    """Add the maps into the weights, which are plain again; what the model computes stays the same."""
    fold_into((model.model.embed_tokens, model.lm_head))


def fold_into(tables: Sequence[Table]) -> None:
    """The same for any tables; those that have no map are left alone."""
    for table in tables:
        if parametrize.is_parametrized(table, "weight"):
            parametrize.remove_parametrizations(table, "weight", leave_parametrized=True)
