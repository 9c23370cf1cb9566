"""The aligner's objective: CTC alone, without codebook or attention head.

Place in the pipeline: layer 3, given to the trainer with an `AudioBatch` loader.
Trap: the loss is per text id, so that sums over batches and ranks add up.
"""

import torch

from speechquilt.tokenizer.emitters import CharacterCTC
from speechquilt.types import IGNORE, AudioBatch


def ctc_objective(model: CharacterCTC, batch: AudioBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed -log p(text), number of text ids, no further scalars)."""
    states_BFD, num_frames_B = model(batch.wav_BS, batch.num_samples_B)
    return model.ctc.loss(states_BFD, num_frames_B, batch.text_BL).sum(), (batch.text_BL != IGNORE).sum(), {}
