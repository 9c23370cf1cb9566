"""The speech tokenizer's objective: CTC + attention ASR loss through the bottleneck, plus commitment (spec 1, 2.4).

Place in the pipeline: layer 3, given to the trainer with an `AudioBatch` loader.
Trap: all losses are per text id, so that sums over batches and ranks add up. A clip's commitment (mean over its tokens)
counts once per id of its text.
"""

import torch

from speechquilt.nn.quantize import perplexity
from speechquilt.tokenizer.model import SpeechTokenizer
from speechquilt.types import IGNORE, AudioBatch


def asr_objective(
    model: SpeechTokenizer, batch: AudioBatch
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of text ids, sums of named scalars).

    Scalars, per text id: `ctc`, `attention`, `commitment` (before their weights). Per batch: `codes`, distinct codes in
    it, and `perplexity` of the codebook's running use; both 0 while the VQ warm-up bypasses the codebook.
    """
    config = model.config
    encoded = model(batch.wav_BS, batch.num_samples_B, batch.text_BL)
    num_ids_B = (batch.text_BL != IGNORE).sum(1)
    ctc, attention = encoded.ctc_B.sum(), encoded.attention_B.sum()
    commitment = (encoded.commitment_BT.sum(1) / encoded.num_tokens_B * num_ids_B).sum()
    loss = config.ctc_weight * ctc + (1 - config.ctc_weight) * attention + config.commitment_weight * commitment
    one = torch.ones((), device=loss.device)
    scalars = {"ctc": ctc.detach(), "attention": attention.detach(), "commitment": commitment.detach()}
    scalars |= {"codes": one * 0, "codes_weight": one, "perplexity": one * 0, "perplexity_weight": one}
    if encoded.ids_BT is not None:
        positions_T = torch.arange(encoded.ids_BT.shape[1], device=loss.device)
        valid_BT = positions_T < encoded.num_tokens_B[:, None]
        scalars["codes"] = one * len(encoded.ids_BT[valid_BT].unique())
        scalars["perplexity"] = perplexity(model.quantizer.ema_count_K)
    return loss, num_ids_B.sum(), scalars
