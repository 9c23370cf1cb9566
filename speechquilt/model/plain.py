"""The plain language model: embedding, Llama stack, untied head. The papers' baseline and the first paper's LM.

It ignores the opens and closes of a Batch. Embeddings and head are untied (spec 2, 6.3), so the vocabulary counts twice
in the parameters.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from speechquilt.nn.attention import KVState
from speechquilt.nn.llama import LlamaConfig, LlamaStack, init_weights
from speechquilt.types import Batch
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class PlainLMConfig:
    """A plain language model: one transformer over tokens, text and speech alike."""

    vocab_size: int
    """Ids of the vocabulary: text, special and speech tokens. 0: not known yet; a run takes it from its tokenizers."""
    llama: LlamaConfig
    """Sizes of the transformer."""

    def for_vocab(self, vocab: Vocab) -> "PlainLMConfig":
        """The same model with the sizes of this vocabulary."""
        return replace(self, vocab_size=vocab.size)

    def build(self, seed: int = 0) -> "PlainLM":
        model = PlainLM(self)
        init_weights(model, torch.Generator().manual_seed(seed))
        return model


class PlainLM(nn.Module):
    def __init__(self, config: PlainLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.llama.width)
        self.llama = LlamaStack(config.llama)
        self.head = nn.Linear(config.llama.width, config.vocab_size, bias=False)

    def blocks(self) -> list[nn.Module]:
        """The parts that a trainer shards, compiles and recomputes one by one."""
        return list(self.llama.layers)

    def forward(self, batch: Batch) -> torch.Tensor:
        """-> `logits_BTV`, causal within each document."""
        return self.head(self.llama(self.embedding(batch.ids_BT), self.llama.mask(batch.doc_BT)))

    def logits_at(self, batch: Batch, wanted_BT: torch.Tensor) -> torch.Tensor:
        """-> `logits_NV` at the N places where bool `wanted_BT` is True, in row order."""
        return self.head(self.llama(self.embedding(batch.ids_BT), self.llama.mask(batch.doc_BT))[wanted_BT])

    def init_state(self, num_rows: int, max_tokens: int) -> KVState:
        """One document per row; `state.reset(rows_B)` begins a new one."""
        return self.llama.init_state(num_rows, max_tokens)

    @torch.no_grad()
    def read_on(
        self, ids_BT: torch.Tensor, num_B: torch.Tensor, state: KVState, wanted_BT: torch.Tensor
    ) -> tuple[torch.Tensor, KVState]:
        """Row b reads the first `num_B[b]` of its ids -> `logits_NV` where bool `wanted_BT` is True, in row order, and the
        new state."""
        x_BTD, state = self.llama.extend(self.embedding(ids_BT), num_B, state)
        return self.head(x_BTD[wanted_BT]), state

    @torch.no_grad()
    def step(
        self,
        ids_B: torch.Tensor,
        opens_B: torch.Tensor | None,
        closes_B: torch.Tensor | None,
        state: KVState,
        active_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, KVState]:
        """One token per row -> `logits_BV` for the next, and the new state; rows not active are left alone."""
        x_BD, state = self.llama.step(self.embedding(ids_B), state, active_B)
        return self.head(x_BD), state
