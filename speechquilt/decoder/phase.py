"""Log-mel -> waveform without training: phases that fit the magnitudes, found frame by frame (real-time iterative
spectrogram inversion with look-ahead: Zhu, Beauregard and Wyse, 2007; the momentum is Perraudin's, 2013).

A frame's phase is settled once `frames_ahead` more frames are known; until then it is refined together with them,
against the settled past. So phases run on over every joint, at a constant cost per frame.
Trap: a mel does not hold the linear magnitudes. They start at the least-squares solution and follow, in every round, what
the overlapping frames can agree on, as far as the mel allows.

Axis letters: B rows, M mel bands, F frames, H frequencies, W frames in work (oldest first), N samples under a window,
S samples.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.overlap import SMALLEST_WEIGHT, OverlapAdd, OverlapState
from speechquilt.decoder.vocoder_rows import check_frames, rows_alone

SMALLEST_MAGNITUDE = 1e-9  # keeps a phase in a frequency that a mel says nothing of
SMALLEST_BAND = 1e-12  # of a division: far below what silence is in a mel


@dataclass(frozen=True, kw_only=True)
class PhaseVocoderConfig:
    """How much work goes into the phases. More frames and more rounds: nearer to the mel, later and slower."""

    mel: MelConfig = MelConfig()
    """The frames it takes."""
    frames_ahead: int = 3
    """Frames after a frame that are refined with it before its phase is settled. Each is a hop of delay."""
    rounds: int = 8
    """Refinements of all frames in work, each time a frame comes."""
    momentum: float = 0.9
    """How far a refinement goes on in the direction of the last one, in [0, 1). 0 is Griffin and Lim's."""
    drift: float = 0.1
    """How far the linear magnitudes move in a round towards those that fit the mel and the other frames, in [0, 1]. 0
    keeps the first guess, which is smooth between the bands, so that upper harmonics are lost."""
    seed: int = 0
    """Of the phases before the first frame."""

    def __post_init__(self) -> None:
        for key, least in (("frames_ahead", 0), ("rounds", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in [0, 1), for example 0.9")
        if not 0.0 <= self.drift <= 1.0:
            raise ValueError(f"drift={self.drift} must lie in [0, 1], for example 0.1")

    def build(self) -> "PhaseVocoder":
        return PhaseVocoder(self)


@dataclass(frozen=True)
class PhaseState:
    """The samples of settled frames, and the frames in work: at most `frames_ahead` between two steps.

    `before_2H`: spectra of the two frames before those in work; `spectrum_WH` complex; `magnitude_WH`; `wanted_WH`: the
    mel's magnitudes spread over the frequencies of their bands.
    """

    overlap: OverlapState
    before_2H: torch.Tensor
    spectrum_WH: torch.Tensor
    magnitude_WH: torch.Tensor
    wanted_WH: torch.Tensor


class PhaseVocoder(nn.Module):
    """The vocoder. It has no weights; its buffers follow from the config."""

    inverse_HM: torch.Tensor
    spread_HM: torch.Tensor
    start_2H: torch.Tensor

    def __init__(self, config: PhaseVocoderConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = config.mel
        self.overlap = OverlapAdd(config.mel)
        self.lookahead_frames = config.frames_ahead + self.overlap.lookahead_frames
        spread_HM = config.mel.build().filters_HM
        angle_2H = 2 * torch.pi * torch.rand(2, len(spread_HM), generator=torch.Generator().manual_seed(config.seed))
        self.register_buffer("spread_HM", spread_HM, persistent=False)
        self.register_buffer("inverse_HM", torch.linalg.pinv(spread_HM.double().T).float(), persistent=False)
        self.register_buffer("start_2H", torch.polar(torch.ones_like(angle_2H), angle_2H), persistent=False)

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Right-padded frames -> `wav_BS`, zero past a row's end. Raises ValueError on what is no log-mel."""

        def one(mel_MF: torch.Tensor) -> torch.Tensor:
            return self.step(mel_MF, self.init_state(), final=True)[0]

        return rows_alone(one, mel_BMF, num_frames_B, self.mel)

    def init_state(self) -> PhaseState:
        none_WH = self.spread_HM.new_zeros(0, len(self.spread_HM))
        return PhaseState(self.overlap.init_state(1), self.start_2H, none_WH.to(torch.cfloat), none_WH, none_WH)

    @torch.no_grad()
    def step(self, mel_MF: torch.Tensor, state: PhaseState, *, final: bool = False) -> tuple[torch.Tensor, PhaseState]:
        """Any number of new frames -> the samples that are now certain, and the new state; a fresh one after `final`."""
        waves = [self.spread_HM.new_zeros(0)]
        for band_M in check_frames(mel_MF, self.mel).exp().T:
            state = self._refined(self._with(band_M, state))
            if len(state.spectrum_WH) > self.config.frames_ahead:
                wav_S, state = self._settled(state)
                waves.append(wav_S)
        while final and len(state.spectrum_WH):
            state = self._refined(state)
            wav_S, state = self._settled(state)
            waves.append(wav_S)
        if final:
            none_BFN = self.overlap.window_N.new_zeros(1, 0, len(self.overlap.window_N))
            waves.append(self.overlap.step(none_BFN, state.overlap, final=True)[0][0])
            state = self.init_state()
        return torch.cat(waves), state

    def _with(self, band_M: torch.Tensor, state: PhaseState) -> PhaseState:
        """The state with one more frame in work, whose phases go on as from the last but one to the last."""
        magnitude_H = (self.inverse_HM @ band_M).clamp(min=SMALLEST_MAGNITUDE)
        earlier_H, last_H = torch.cat([state.before_2H, state.spectrum_WH])[-2:].sgn()
        spectrum_H = magnitude_H * last_H.square() * earlier_H.conj()
        return PhaseState(
            state.overlap,
            state.before_2H,
            torch.cat([state.spectrum_WH, spectrum_H[None]]),
            torch.cat([state.magnitude_WH, magnitude_H[None]]),
            torch.cat([state.wanted_WH, (self.spread_HM @ band_M)[None]]),
        )

    def _refined(self, state: PhaseState) -> PhaseState:
        """The frames in work, nearer to frames of one waveform that has their mel and continues the settled one."""
        config, window_N = self.config, self.overlap.window_N
        num_points, hop = config.mel.fft_samples, config.mel.hop
        spectrum_WH, magnitude_WH, last_WH = state.spectrum_WH, state.magnitude_WH, None
        room = num_points + (len(spectrum_WH) - 1) * hop - state.overlap.sum_BS.shape[1]
        weight_S = F.pad(state.overlap.weight_BS[0], (0, room))
        for start in range(0, len(spectrum_WH) * hop, hop):
            weight_S[start : start + num_points] += window_N.square()
        weight_S.clamp_(min=SMALLEST_WEIGHT)
        for _ in range(config.rounds):
            wav_S = F.pad(state.overlap.sum_BS[0], (0, room))
            for i, frame_N in enumerate(torch.fft.irfft(spectrum_WH, n=num_points) * window_N):
                wav_S[i * hop : i * hop + num_points] += frame_N
            seen_WH = torch.fft.rfft((wav_S / weight_S).unfold(0, num_points, hop) * window_N)
            near_WH = seen_WH.abs()
            near_WH = near_WH * state.wanted_WH / (near_WH @ self.spread_HM @ self.spread_HM.T + SMALLEST_BAND)
            magnitude_WH = magnitude_WH.lerp(near_WH, config.drift)
            ahead_WH = seen_WH if last_WH is None else seen_WH + config.momentum * (seen_WH - last_WH)
            spectrum_WH, last_WH = magnitude_WH * ahead_WH.sgn(), seen_WH
        return PhaseState(state.overlap, state.before_2H, spectrum_WH, magnitude_WH, state.wanted_WH)

    def _settled(self, state: PhaseState) -> tuple[torch.Tensor, PhaseState]:
        """The oldest frame in work becomes sound."""
        frame_N = torch.fft.irfft(state.spectrum_WH[0], n=self.config.mel.fft_samples)
        wav_BS, overlap = self.overlap.step(frame_N[None, None], state.overlap)
        before_2H = torch.cat([state.before_2H[1:], state.spectrum_WH[:1]])
        return wav_BS[0], PhaseState(
            overlap, before_2H, state.spectrum_WH[1:], state.magnitude_WH[1:], state.wanted_WH[1:]
        )
