"""Loss of a language model on documents that it was never trained on, per source, while it trains.

The documents are laid out and patched as in a test, so the numbers of one run compare from step to step; those of
another patcher or of speech pieces are per token of theirs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from speechquilt.evals.scorer import one_per_row
from speechquilt.nn.batching import longest_first
from speechquilt.protocols import Patcher
from speechquilt.types import IGNORE, Batch, Document, LaidOut
from speechquilt.vocab import Vocab


class HeldOut:
    """Documents of each source, ready to be asked again and again; those longer than `max_tokens` are cut there.

    `max_tokens` also bounds a batch, padding included. `patcher` None: a token-level model.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[Document]],
        vocab: Vocab,
        patcher: Patcher | None,
        max_tokens: int,
    ) -> None:
        self.vocab, self.patcher, self.max_tokens = vocab, patcher, max_tokens
        self.laid_out = {name: [vocab.lay_out(d) for d in items] for name, items in documents.items()}

    @torch.no_grad()
    def losses(self, model: nn.Module) -> dict[str, float]:
        """`held_out_<source>`: nats per target token. Under torchrun every rank asks for the same, all together."""
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            return {f"held_out_{name}": self._loss(model, items, device) for name, items in self.laid_out.items()}
        finally:
            model.train(was_training)

    def _loss(self, model: nn.Module, items: Sequence[LaidOut], device: torch.device) -> float:
        loss, targets = 0.0, 0
        lengths = [min(len(x.ids_T), self.max_tokens) for x in items]
        for rows in longest_first(lengths, budget=self.max_tokens):
            batch = self._batch([items[i] for i in rows]).to(device)
            logits_BTV = model(batch).float()
            summed = functional.cross_entropy(
                logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss, targets = loss + float(summed), targets + int((batch.labels_BT != IGNORE).sum())
        return loss / max(1, targets)

    def _batch(self, items: Sequence[LaidOut]) -> Batch:
        """Every target of every document is asked for."""
        labels = [np.append(np.where(item.loss_T[1:], item.ids_T[1:], IGNORE), IGNORE) for item in items]
        return one_per_row(items, labels, self.vocab.pad, self.patcher, self.max_tokens)
