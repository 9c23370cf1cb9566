"""Loss of a language model on documents that it was never trained on, per source, while it trains.

The documents are laid out and patched as in a test, so the numbers of one run compare from step to step; those of
another patcher or of speech pieces are per token of theirs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from speechquilt.nn.batching import longest_first
from speechquilt.protocols import Patcher
from speechquilt.types import IGNORE, Batch, Document, LaidOut
from speechquilt.vocab import Vocab

DRAW = 0.0  # patchers that choose at random get this instead of a draw


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
        """One document per row, padding as a second document."""
        shape = (len(items), min(self.max_tokens, max(len(x.ids_T) for x in items)))
        ids_BT = np.full(shape, self.vocab.pad, dtype=np.int64)
        labels_BT = np.full(shape, IGNORE, dtype=np.int64)
        doc_BT = np.ones(shape, dtype=np.int64)
        opens_BT, closes_BT = np.ones(shape, dtype=bool), np.ones(shape, dtype=bool)
        for b, item in enumerate(items):
            n = min(len(item.ids_T), shape[1])
            ids_BT[b, :n], doc_BT[b, :n] = item.ids_T[:n], 0
            labels_BT[b, : n - 1] = np.where(item.loss_T[1:n], item.ids_T[1:n], IGNORE)
            if self.patcher is not None:
                opens_T, closes_T = self.patcher(item, DRAW)
                opens_BT[b, :n], closes_BT[b, :n] = opens_T[:n], closes_T[:n]
        patched = self.patcher is not None
        return Batch(
            ids_BT=torch.from_numpy(ids_BT),
            labels_BT=torch.from_numpy(labels_BT),
            doc_BT=torch.from_numpy(doc_BT),
            opens_BT=torch.from_numpy(opens_BT) if patched else None,
            closes_BT=torch.from_numpy(closes_BT) if patched else None,
        )
