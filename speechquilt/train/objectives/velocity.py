"""The objective of the speech decoder's flow: the squared error of its velocity (spec 1, 3.1).

Trap: what is drawn comes from torch's global generators, which are seeded per rank and held by every checkpoint, so a
resumed run draws what the killed one would have. Two ranks therefore draw other times and noise than one.
"""

from dataclasses import dataclass, fields

import torch

from speechquilt.decoder.flow import FlowDecoder
from speechquilt.decoder.matching import FlowDraws, draw_flow


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Utterances or stretches of them: speech tokens and the mel of the same sound, both padded on the right.

    `ids_BT` int64, `num_tokens_B`; `mel_BMF` log-mel of the decoder's mel, `num_frames_B`, at most what the tokens have
    frames; `first_B` the place of each row's first token in its utterance, the start of a block of the encoder, None
    where all begin at its start; `speaker_BE` a vector of the speaker, None without.
    """

    ids_BT: torch.Tensor
    num_tokens_B: torch.Tensor
    mel_BMF: torch.Tensor
    num_frames_B: torch.Tensor
    first_B: torch.Tensor | None = None
    speaker_BE: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "FlowBatch":
        """The same batch on another device."""
        moved = {
            f.name: x.to(device, non_blocking=True) for f in fields(self) if (x := getattr(self, f.name)) is not None
        }
        return FlowBatch(**moved)

    def validate(self, model: FlowDecoder) -> "FlowBatch":
        """Check that it fits the decoder; raises ValueError naming the first rule broken. It waits for a GPU."""
        config = model.config
        if self.mel_BMF.shape[1] != config.mel.num_mels:
            raise ValueError(f"mel_BMF has {self.mel_BMF.shape[1]} bands; num_mels={config.mel.num_mels} are expected")
        if int(self.num_frames_B.min()) < 1:
            raise ValueError("num_frames_B has a row without frames; leave it out of the batch")
        first_B = _first(self)
        if bool((first_B % config.encoder.block_tokens != 0).any()) or int(first_B.min()) < 0:
            raise ValueError(
                f"first_B={first_B.tolist()} must be multiples of block_tokens={config.encoder.block_tokens}: cut "
                "utterances where a block of the encoder begins"
            )
        time = model.time
        allowed_B = time.num_frames(first_B + self.num_tokens_B) - time.num_frames(first_B)
        if bool((self.num_frames_B > allowed_B).any()):
            b = int((self.num_frames_B - allowed_B).argmax())
            raise ValueError(
                f"row {b} has {int(self.num_frames_B[b])} mel frames for {int(self.num_tokens_B[b])} tokens, which last "
                f"{int(allowed_B[b])}; cut the mel, and look whether both are of the same sound and rate"
            )
        if int(self.ids_BT.min()) < 0 or int(self.ids_BT.max()) >= config.codebook_size:
            raise ValueError(
                f"ids_BT has ids {int(self.ids_BT.min())} to {int(self.ids_BT.max())}; they must lie in "
                f"0..{config.codebook_size - 1} (codebook_size), the padding too"
            )
        if self.speaker_BE is not None and self.speaker_BE.shape[1] != config.speaker_width:
            raise ValueError(
                f"speaker_BE has {self.speaker_BE.shape[1]} numbers per row; speaker_width={config.speaker_width} are "
                "expected"
            )
        return self


def flow_objective(model: FlowDecoder, batch: FlowBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of mel frames, sums of named scalars). A frame's loss is the mean over its bands.

    Scalars: `conditioned` and `unconditioned`, the velocity's loss of the frames with and without conditions (while the two
    are alike, the model does not use what it is told); `guess`, the loss of the first guess where there is one.
    """
    config = model.config
    draws = draw_flow(
        batch.mel_BMF,
        batch.num_frames_B,
        prompt_chance=config.prompt_chance,
        prompt_share=config.prompt_share,
        drop_chance=config.drop_chance,
    )
    return flow_loss(model, batch, draws)


def flow_loss(
    model: FlowDecoder, batch: FlowBatch, draws: FlowDraws
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """`flow_objective` with given draws."""
    errors = model(
        batch.ids_BT,
        batch.num_tokens_B,
        batch.mel_BMF,
        batch.num_frames_B,
        _first(batch),
        batch.speaker_BE,
        draws,
    )
    error_B, kept_B = errors.velocity_BF.detach().sum(1), draws.keep_B
    scalars = {
        "conditioned": (error_B * kept_B).sum(),
        "conditioned_weight": (batch.num_frames_B * kept_B).sum(),
        "unconditioned": (error_B * ~kept_B).sum(),
        "unconditioned_weight": (batch.num_frames_B * ~kept_B).sum(),
    }
    loss = errors.velocity_BF.sum()
    if model.config.guess and errors.guess_BF is not None:
        guess = errors.guess_BF.sum()
        scalars["guess"] = guess.detach()
        loss = loss + model.config.guess.weight * guess
    return loss, batch.num_frames_B.sum(), scalars


def _first(batch: FlowBatch) -> torch.Tensor:
    return torch.zeros_like(batch.num_tokens_B) if batch.first_B is None else batch.first_B
