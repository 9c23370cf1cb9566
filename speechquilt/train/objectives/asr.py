"""The speech tokenizer's objective: CTC + attention ASR loss through the bottleneck, plus commitment (spec 1, 2.4).

All losses are per text id, so that sums over batches and ranks add up. A clip's commitment (mean over its tokens)
counts once per id of its text.
"""

from contextlib import nullcontext

import torch

from speechquilt.nn.quantize import perplexity
from speechquilt.tokenizer.emitters import CharacterCTC
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed
from speechquilt.train.spec_augment import SpecAugment
from speechquilt.types import IGNORE, AudioBatch


def asr_objective(
    model: SupervisedTokenizer, batch: AudioBatch, augment: SpecAugment | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of text ids, sums of named scalars). `augment` hides parts of the features in training
    mode.

    Scalars, per text id: `ctc`, `attention`, `commitment` (before their weights). Per batch: `codes`, distinct codes in
    it; `perplexity` of the codebook's running use; `dead`, the codes below the restart threshold, which the next
    restart replaces (right after one: 0). All three are 0 while the VQ warm-up bypasses the codebook. `total_restarts`:
    codes that were replaced, counted once however many ranks there are.
    """
    config = model.config
    with augment.behind(model.log_mel) if augment is not None and model.training else nullcontext():
        encoded = model(batch.wav_BS, batch.num_samples_B, batch.text_BL)
    num_ids_B = (batch.text_BL != IGNORE).sum(1)
    ctc, attention = encoded.ctc_B.sum(), encoded.attention_B.sum()
    commitment = (encoded.commitment_BT.sum(1) / encoded.num_tokens_B * num_ids_B).sum()
    loss = config.ctc_weight * ctc + (1 - config.ctc_weight) * attention + config.commitment_weight * commitment
    scalars = {"ctc": ctc.detach(), "attention": attention.detach(), "commitment": commitment.detach()}
    per_batch = codebook_use(model, encoded.ids_BT, encoded.num_tokens_B)
    one = torch.ones((), device=loss.device)
    # All ranks replace the same codes, and the trainer adds over ranks.
    restarts = model.quantizer.restarted if distributed.rank() == 0 else 0
    per_batch |= {f"{name}_weight": one for name in per_batch}
    return loss, num_ids_B.sum(), scalars | per_batch | {"total_restarts": one * restarts}


def codebook_use(
    model: SupervisedTokenizer, ids_BT: torch.Tensor | None, num_tokens_B: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`codes`, `perplexity` and `dead` of one batch, without waiting for the device; `ids_BT` None: all 0."""
    if ids_BT is None:
        zero = torch.zeros((), device=num_tokens_B.device)
        return {"codes": zero, "perplexity": zero, "dead": zero}
    count_K = model.quantizer.ema_count_K
    valid_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < num_tokens_B[:, None]
    heard_K = torch.zeros_like(count_K).index_add_(0, ids_BT.flatten(), valid_BT.flatten().to(count_K.dtype))
    dead_K = count_K < model.config.vq_restart_threshold * count_K.mean()
    return {
        "codes": (heard_K > 0).float().sum(),
        "perplexity": perplexity(count_K),
        "dead": dead_K.float().sum(),
    }


def ctc_objective(model: CharacterCTC, batch: AudioBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed -log p(text), number of text ids, no further scalars)."""
    states_BFD, num_frames_B = model(batch.wav_BS, batch.num_samples_B)
    return model.ctc.loss(states_BFD, num_frames_B, batch.text_BL).sum(), (batch.text_BL != IGNORE).sum(), {}
