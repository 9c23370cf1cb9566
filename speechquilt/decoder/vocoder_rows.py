"""What every vocoder does with its frames: checks them, and turns a batch into rows when a row must be alone.

Axis letters: B rows, M mel bands, F frames, S samples.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from speechquilt.decoder.mel import MelConfig


def check_frames(mel_MF: torch.Tensor, mel: MelConfig) -> torch.Tensor:
    """`mel_MF` as float32, or ValueError saying why it cannot become sound."""
    if mel_MF.ndim != 2 or len(mel_MF) != mel.num_mels or not mel_MF.is_floating_point():
        raise ValueError(
            f"frames of shape {tuple(mel_MF.shape)} and {mel_MF.dtype} are no log-mel; floats [{mel.num_mels}, frames] "
            "are expected"
        )
    if not torch.isfinite(mel_MF).all():
        raise ValueError("log-mel frames must be finite; these hold NaN or infinity, look at what made them")
    return mel_MF.float()


def check_rows(mel_BMF: torch.Tensor, num_frames_B: torch.Tensor, mel: MelConfig) -> None:
    """Raises ValueError for a batch that is none: another shape, rows without frames or longer than the batch, NaN."""
    if mel_BMF.ndim != 3 or num_frames_B.shape != mel_BMF.shape[:1]:
        raise ValueError(
            f"mel has shape {tuple(mel_BMF.shape)} with {tuple(num_frames_B.shape)} lengths; [rows, {mel.num_mels}, "
            "frames] with a length per row is expected"
        )
    for b, num_frames in enumerate(num_frames_B.tolist()):
        if not 0 < num_frames <= mel_BMF.shape[2]:
            raise ValueError(
                f"row {b} has {num_frames} frames; 1..{mel_BMF.shape[2]}, those of the batch, are expected"
            )
        check_frames(mel_BMF[b, :, :num_frames], mel)


def rows_alone(
    one: Callable[[torch.Tensor], torch.Tensor], mel_BMF: torch.Tensor, num_frames_B: torch.Tensor, mel: MelConfig
) -> torch.Tensor:
    """`one` makes `[M, F]` into `[F * hop]` -> `[B, F * hop]`, zero past a row's end. Raises as `check_rows`."""
    check_rows(mel_BMF, num_frames_B, mel)
    stop = mel_BMF.shape[2] * mel.hop
    waves = [one(mel_MF[:, :num_frames]) for mel_MF, num_frames in zip(mel_BMF, num_frames_B.tolist())]
    return torch.stack([F.pad(wav_S, (0, stop - len(wav_S))) for wav_S in waves])
