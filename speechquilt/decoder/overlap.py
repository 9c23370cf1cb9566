"""Windowed frames -> samples by overlap-add, with what later frames still reach carried from step to step.

Trap: a sum of windows is divided by the sum of their squares *so far*, so the first and the last samples of an
utterance, which fewer frames reach, are as loud as the others; half an overlap at either end belongs to no frame and is
dropped, so F frames are F * hop samples.

Axis letters: B rows, F frames, N samples under a window, S samples.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.mel import MelConfig

SMALLEST_WEIGHT = 1e-4  # only where samples are dropped is the sum of squared windows smaller


@dataclass(frozen=True)
class OverlapState:
    """`sum_BS` and `weight_BS` `[B, fft_samples - hop]`: windowed frames and squared windows so far, of the samples that
    the next frame reaches too; `skip`: samples still to be dropped, since they lie before the utterance."""

    sum_BS: torch.Tensor
    weight_BS: torch.Tensor
    skip: int


class OverlapAdd(nn.Module):
    """The least-squares inverse of the windows of a `MelConfig`, a frame at a multiple of the hop."""

    window_N: torch.Tensor

    def __init__(self, mel: MelConfig) -> None:
        """Raises ValueError when less than two windows overlap, which no sum of windows can mend."""
        super().__init__()
        if 2 * mel.hop > mel.fft_samples:
            raise ValueError(f"hop={mel.hop} must be at most half of fft_samples={mel.fft_samples} to make a waveform")
        self.hop, self.edge = mel.hop, (mel.fft_samples - mel.hop) // 2
        self.register_buffer("window_N", torch.hann_window(mel.fft_samples), persistent=False)

    @property
    def lookahead_frames(self) -> int:
        """Frames after its own that a sample waits for."""
        return -(-self.edge // self.hop)

    def init_state(self, num_rows: int) -> OverlapState:
        zeros_BS = self.window_N.new_zeros(num_rows, 2 * self.edge)
        return OverlapState(zeros_BS, zeros_BS, self.edge)

    def step(
        self,
        frames_BFN: torch.Tensor,
        state: OverlapState,
        *,
        valid_BF: torch.Tensor | None = None,
        final: bool = False,
    ) -> tuple[torch.Tensor, OverlapState]:
        """Frames, not windowed yet -> the samples that no later frame reaches, and the new state.

        `valid_BF`: 0 for frames after a row's end. After `final` the state is that of nothing heard.
        """
        weight_BFN = self.window_N.square().expand(frames_BFN.shape)
        frames_BFN = frames_BFN * self.window_N
        if valid_BF is not None:
            weight_BFN, frames_BFN = weight_BFN * valid_BF[..., None], frames_BFN * valid_BF[..., None]
        sum_BS = self._added(frames_BFN, state.sum_BS)
        weight_BS = self._added(weight_BFN, state.weight_BS)
        done = frames_BFN.shape[1] * self.hop
        stop = done + self.edge if final else done
        wav_BS = (sum_BS[:, :stop] / weight_BS[:, :stop].clamp(min=SMALLEST_WEIGHT))[:, state.skip :]
        if final:
            return wav_BS, self.init_state(len(frames_BFN))
        return wav_BS, OverlapState(sum_BS[:, done:], weight_BS[:, done:], max(0, state.skip - done))

    def _added(self, frames_BFN: torch.Tensor, carried_BS: torch.Tensor) -> torch.Tensor:
        """`[B, (F - 1) * hop + N]`: the frames at their places over what was carried."""
        num_frames = frames_BFN.shape[1]
        if not num_frames:
            return carried_BS
        reach = (num_frames - 1) * self.hop + len(self.window_N)
        new_B11S = F.fold(frames_BFN.transpose(1, 2), (1, reach), (1, len(self.window_N)), stride=(1, self.hop))
        return new_B11S[:, 0, 0] + F.pad(carried_BS, (0, reach - carried_BS.shape[1]))
