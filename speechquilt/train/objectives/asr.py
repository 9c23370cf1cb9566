"""The speech tokenizer's objective: CTC + attention ASR loss through the bottleneck, plus commitment (spec 1, 2.4).

Sums have one weight, the text ids, so that they add up over batches and ranks.
Trap: commitment is a mean over tokens, and a sum over tokens divided by ids is not. Every token counts as much as the
ids that its time has on average (`text_ids_per_s`), a constant: a batch of slow speech has a little more commitment.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from speechquilt.nn.batching import valid_places
from speechquilt.nn.quantize import perplexity
from speechquilt.tokenizer.emitters import CharacterCTC
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed
from speechquilt.train.feature_augment import FeatureAugment
from speechquilt.types import IGNORE, AudioBatch


def asr_objective(
    model: SupervisedTokenizer, batch: AudioBatch, augments: Sequence[FeatureAugment] = (), latest_s: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of text ids, sums of named scalars). In training mode `augments` change the
    features, one after the other, and the batch begins up to `latest_s` into the window, drawn from torch's CPU generator.

    Scalars, before their weights: `ctc` (where there is such a head) and `attention` per text id, `commitment` per token.
    Per batch: `codes`, distinct codes in
    it; `perplexity` of the codebook's running use; `dead`, the codes below the restart threshold, which the next
    restart replaces (right after one: 0). All three are 0 while the VQ warm-up bypasses the codebook. `total_restarts`:
    codes that were replaced, counted once however many ranks there are.
    """
    config = model.config
    later = drawn_place(model, batch.wav_BS.shape[1], latest_s) if model.training else 0
    with ExitStack() as changed:
        for augment in augments if model.training else ():
            changed.enter_context(augment.behind(model.log_mel))
        encoded = model(batch.wav_BS, batch.num_samples_B, batch.text_BL, later)
    attention, commitment = encoded.attention_B.sum(), encoded.commitment_BT.sum()
    ids_per_token = config.text_ids_per_s / model.frame_rate
    loss = (1 - config.ctc_weight) * attention + config.commitment_weight * ids_per_token * commitment
    scalars = {"attention": attention.detach(), "commitment": commitment.detach()}
    scalars["commitment_weight"] = encoded.num_tokens_B.sum()
    if encoded.ctc_B is not None:
        scalars["ctc"] = encoded.ctc_B.sum().detach()
        loss = loss + config.ctc_weight * encoded.ctc_B.sum()
    per_batch = codebook_use(model, encoded.ids_BT, encoded.num_tokens_B)
    one = torch.ones((), device=loss.device)
    # All ranks replace the same codes, and the trainer adds over ranks.
    restarts = model.quantizer.restarted if distributed.rank() == 0 else 0
    per_batch |= {f"{name}_weight": one for name in per_batch}
    return loss, (batch.text_BL != IGNORE).sum(), scalars | per_batch | {"total_restarts": one * restarts}


def drawn_place(model: SupervisedTokenizer, num_samples: int, latest_s: float) -> int:
    """Tokens of a window that come before the batch: each number as likely up to `latest_s`, and as far as the window
    holds both."""
    room = model.rule.core - -(-num_samples // model.token_samples)
    latest = max(0, min(room, round(latest_s * model.frame_rate)))
    return int(torch.randint(latest + 1, ())) if latest else 0  # on the CPU


def codebook_use(
    model: SupervisedTokenizer, ids_BT: torch.Tensor | None, num_tokens_B: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`codes`, `perplexity` and `dead` of one batch, without waiting for the device; `ids_BT` None: all 0."""
    if ids_BT is None:
        zero = torch.zeros((), device=num_tokens_B.device)
        return {"codes": zero, "perplexity": zero, "dead": zero}
    count_K = model.quantizer.ema_count_K
    valid_BT = valid_places(num_tokens_B, ids_BT.shape[1])
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
