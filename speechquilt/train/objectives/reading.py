"""The objective of a reader of finished tokens: the text's negative log-likelihood by the attention decoder.

Trap: sums, as every objective; a batch of short spans has few text ids and weighs as little.
"""

from dataclasses import dataclass

import torch

from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import IGNORE


@dataclass(frozen=True, kw_only=True)
class ReadingBatch:
    """Speech tokens and what they say. `ids_BT` int64, padded with any id of the codebook; `num_tokens_B` int64, at least
    one; `text_BL` int64 text ids, padded with IGNORE."""

    ids_BT: torch.Tensor
    num_tokens_B: torch.Tensor
    text_BL: torch.Tensor

    def to(self, device: torch.device | str) -> "ReadingBatch":
        return ReadingBatch(
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            num_tokens_B=self.num_tokens_B.to(device, non_blocking=True),
            text_BL=self.text_BL.to(device, non_blocking=True),
        )


def reading_objective(
    model: SupervisedTokenizer, batch: ReadingBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of text ids, no scalars)."""
    loss_B = model.reading_loss(batch.ids_BT, batch.num_tokens_B, batch.text_BL)
    return loss_B.sum(), (batch.text_BL != IGNORE).sum(), {}
