"""Next-token prediction over text and speech: the objective of every language model here.

Trap: nothing here may wait for the GPU, so text and speech are told apart by masks, never by selecting positions.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from speechquilt.types import IGNORE, Batch
from speechquilt.vocab import Vocab

LOSSES = ("split_documents", "cut_documents", "cut_tokens", "dropped_documents")  # what was longer than a row
COUNTS = ("tokens", "speech_tokens", "units", "speech_units")


class NextTokenObjective:
    """Summed cross-entropy in nats. Weight: the number of labels.

    Scalars: `text_loss` (text tokens alone, markers in neither), `speech_loss`; `patch_size` and `text_patch_size`
    (tokens per unit of speech, and of text and special tokens), `row_tokens` and `row_units` (means of the rows),
    `waste_tokens` (share of padding in the rows), each with its weight; `total_tokens`, `total_speech_tokens`,
    `total_units`, `total_speech_units`. The counts are those that the packer puts into `batch.meta` (padding not
    counted). `total_split_documents`, `total_cut_documents`, `total_cut_tokens`, `total_dropped_documents` when the
    meta has them. `total_epochs_<source>` (how often each source was trained on) when the meta has `epochs`. `waste_units`
    (share of the rows' units that stay empty) when the meta has `unit_slots`; `total_flops` when `flops(batch)` is
    given, in FLOPs of one training step.

    `labelled_only`: ask the model for logits where there is a label and nowhere else, `model(batch, at_BT)`. Where few
    positions have one this saves most of the head; on a CPU alone, since a GPU would wait to learn how many they are.
    """

    def __init__(
        self, vocab: Vocab, flops: Callable[[Batch], float] | None = None, labelled_only: bool = False
    ) -> None:
        self.vocab = vocab
        self.flops = flops
        self.labelled_only = labelled_only

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        labels_BT = batch.labels_BT
        if self.labelled_only and labels_BT.device.type == "cpu":
            at_BT = labels_BT != IGNORE
            loss_N = functional.cross_entropy(model(batch, at_BT).float(), labels_BT[at_BT], reduction="none")
            loss_BT = torch.zeros(labels_BT.shape).masked_scatter(at_BT, loss_N)
        else:
            loss_BT = functional.cross_entropy(
                model(batch).float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
            ).view_as(labels_BT)
        scalars: dict[str, torch.Tensor] = {}
        detached_BT = loss_BT.detach()
        of_text_BT = self.vocab.is_text(labels_BT) & (labels_BT != IGNORE)
        for name, mask_BT in (("text_loss", of_text_BT), ("speech_loss", self.vocab.is_speech(labels_BT))):
            scalars[name] = (detached_BT * mask_BT).sum()
            scalars[f"{name}_weight"] = mask_BT.sum()
        for name, count in (self._totals(batch) | self._packing(batch)).items():
            scalars[name] = torch.full((), count, dtype=torch.float64, device=labels_BT.device)
        return loss_BT.sum(), (labels_BT != IGNORE).sum(), scalars

    def _totals(self, batch: Batch) -> dict[str, float]:
        missing = [key for key in COUNTS if key not in batch.meta]
        if missing:
            raise ValueError(f"batch.meta lacks {', '.join(missing)}; the packer counts them, padding left out")
        totals = {f"total_{key}": float(batch.meta[key]) for key in COUNTS}
        if self.flops is not None:
            totals["total_flops"] = float(self.flops(batch))
        totals |= {f"total_{key}": float(batch.meta[key]) for key in LOSSES if key in batch.meta}
        epochs = batch.meta.get("epochs", {})  # names every source in every batch: ranks must agree on names
        return totals | {f"total_epochs_{source}": float(share) for source, share in epochs.items()}

    def _packing(self, batch: Batch) -> dict[str, float]:
        """How well the rows are used: sums and their weights."""
        meta, (num_rows, row_length) = batch.meta, batch.ids_BT.shape
        slots = num_rows * row_length
        ratios = {
            "patch_size": (meta["speech_tokens"], meta["speech_units"]),
            "text_patch_size": (meta["tokens"] - meta["speech_tokens"], meta["units"] - meta["speech_units"]),
            "row_tokens": (meta["tokens"], num_rows),
            "row_units": (meta["units"], num_rows),
            "waste_tokens": (slots - meta["tokens"], slots),
        }
        if "unit_slots" in meta:
            ratios["waste_units"] = (meta["unit_slots"] - meta["units"], meta["unit_slots"])
        sums = {name: float(count) for name, (count, _) in ratios.items()}
        return sums | {f"{name}_weight": float(weight) for name, (_, weight) in ratios.items()}
