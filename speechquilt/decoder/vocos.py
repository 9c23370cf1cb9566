"""A vocoder of the Vocos family: ConvNeXt blocks on mel frames, each frame's spectrum, overlap-add (Siuzdak, 2023).

The computation is gemelo-ai/vocos with "same" padding when `frames_ahead` has its largest value, and the weights have
its names without `backbone.` and `head.`. With fewer frames ahead the later convolutions see the past alone.
Trap: convolutions that look ahead delay what comes out of them, so a stream holds back frames between all blocks; the
offline pass is one step that is also the last.

Axis letters: B rows, M mel bands, F frames, D width, H frequencies, K kernel, S samples.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.overlap import OverlapAdd, OverlapState
from speechquilt.decoder.vocoder_rows import check_frames, check_rows
from speechquilt.nn.batching import valid_places

LARGEST_MAGNITUDE = 100.0  # of a frequency: a bad frame must not burst anybody's ears
NORM_EPS = 1e-6
INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class VocosConfig:
    """Sizes; the defaults are those of the published mel vocoder, 13.5 million weights."""

    mel: MelConfig = MelConfig()
    """The frames it takes, and the windows it makes sound with."""
    width: int = 512
    """Numbers per frame between the blocks."""
    ffn_width: int = 1536
    """Width inside each block, usually 3 times `width`."""
    num_layers: int = 8
    """ConvNeXt blocks."""
    kernel: int = 7
    """Frames that a convolution sees; odd."""
    frames_ahead: int = 3
    """Frames after its own that the convolutions see all together, at most (kernel - 1) / 2 each: the first ones use them
    up. Each is a hop of delay; the overlap of the windows adds its own."""

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd, for example 7")
        most = (self.num_layers + 1) * (self.kernel // 2)
        if not 0 <= self.frames_ahead <= most:
            raise ValueError(
                f"frames_ahead={self.frames_ahead} must lie in 0..{most}: {self.kernel // 2} for each of the "
                f"{self.num_layers + 1} convolutions"
            )

    def build(self) -> "Vocos":
        return Vocos(self)


@dataclass(frozen=True)
class VocosState:
    """`waiting`: of each convolution, the inputs `[1, D, up to K - 1]` that its next outputs need."""

    waiting: tuple[torch.Tensor, ...]
    overlap: OverlapState


class AheadConv(nn.Conv1d):
    """A convolution over frames that sees `ahead` of them beyond its own; zeros before the start and after the end."""

    def __init__(self, width_in: int, width_out: int, kernel: int, ahead: int, groups: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, groups=groups)
        self.ahead, self.behind = ahead, kernel - 1 - ahead

    def init_state(self, num_rows: int) -> torch.Tensor:
        return self.weight.new_zeros(num_rows, self.in_channels, self.behind)

    def step(
        self, x_BDF: torch.Tensor, waiting_BDF: torch.Tensor, final: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New inputs -> the outputs that are now certain, the inputs at their places, and what waits."""
        x_BDF = torch.cat([waiting_BDF, F.pad(x_BDF, (0, self.ahead if final else 0))], 2)
        num_out = max(0, x_BDF.shape[2] - self.kernel_size[0] + 1)
        y_BDF = self(x_BDF) if num_out else x_BDF.new_zeros(len(x_BDF), self.out_channels, 0)
        return y_BDF, x_BDF[:, :, self.behind : self.behind + num_out], x_BDF[:, :, num_out:]


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over frames, then a GELU feed-forward layer on each, scaled and added."""

    def __init__(self, config: VocosConfig, ahead: int) -> None:
        super().__init__()
        width = config.width
        self.dwconv = AheadConv(width, width, config.kernel, ahead, groups=width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(width, config.ffn_width)
        self.pwconv2 = nn.Linear(config.ffn_width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1 / config.num_layers))

    def forward(self, x_BDF: torch.Tensor, waiting_BDF: torch.Tensor, final: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """New frames -> those that are now certain, and what waits."""
        y_BDF, x_BDF, waiting_BDF = self.dwconv.step(x_BDF, waiting_BDF, final)
        y_BFD = self.pwconv2(F.gelu(self.pwconv1(self.norm(y_BDF.transpose(1, 2)))))
        return x_BDF + (self.gamma * y_BFD).transpose(1, 2), waiting_BDF


class Vocos(nn.Module):
    """The vocoder, as `protocols.Vocoder`; `forward` has a gradient."""

    def __init__(self, config: VocosConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = config.mel
        self.overlap = OverlapAdd(config.mel)
        self.lookahead_frames = config.frames_ahead + self.overlap.lookahead_frames
        half = config.kernel // 2
        ahead = [min(half, max(0, config.frames_ahead - half * i)) for i in range(config.num_layers + 1)]
        self.embed = AheadConv(config.mel.num_mels, config.width, config.kernel, ahead[0])
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.convnext = nn.ModuleList(ConvNeXtBlock(config, a) for a in ahead[1:])
        self.final_layer_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.out = nn.Linear(config.width, config.mel.fft_samples + 2)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Right-padded frames -> `wav_BS`, zero past a row's end. Raises ValueError on what is no log-mel."""
        check_rows(mel_BMF, num_frames_B, self.mel)
        valid_BF = valid_places(num_frames_B.to(mel_BMF.device), mel_BMF.shape[2]).float()
        wav_BS, _ = self._step(mel_BMF.float(), self._state(len(mel_BMF)), True, valid_BF)
        return wav_BS * valid_BF.repeat_interleave(self.mel.hop, 1)

    def whole_rows(self, mel_BMF: torch.Tensor) -> torch.Tensor:
        """`forward` of rows without padding, unchecked: for training, where a check would wait for the device."""
        return self._step(mel_BMF.float(), self._state(len(mel_BMF)), True, None)[0]

    def init_state(self) -> VocosState:
        return self._state(1)

    @torch.no_grad()
    def step(self, mel_MF: torch.Tensor, state: VocosState, *, final: bool = False) -> tuple[torch.Tensor, VocosState]:
        """Any number of new frames -> the samples that are now certain, and the new state; a fresh one after `final`."""
        wav_BS, state = self._step(check_frames(mel_MF, self.mel)[None], state, final, None)
        return wav_BS[0], self.init_state() if final else state

    def _state(self, num_rows: int) -> VocosState:
        convolutions = [module for module in self.modules() if isinstance(module, AheadConv)]  # in their order
        waiting = tuple(conv.init_state(num_rows) for conv in convolutions)
        return VocosState(waiting, self.overlap.init_state(num_rows))

    def _step(
        self, x_BDF: torch.Tensor, state: VocosState, final: bool, valid_BF: torch.Tensor | None
    ) -> tuple[torch.Tensor, VocosState]:
        """Mel frames of rows side by side -> their samples. `valid_BF`: of rows that end apart, all of whose frames are
        given at once."""

        def masked(x_BDF: torch.Tensor) -> torch.Tensor:
            return x_BDF if valid_BF is None else x_BDF.masked_fill(valid_BF[:, None] == 0, 0.0)

        y_BDF, _, waiting_BDF = self.embed.step(masked(x_BDF), state.waiting[0], final)
        x_BDF, waiting = self.norm(y_BDF.transpose(1, 2)).transpose(1, 2), [waiting_BDF]
        for block, waiting_BDF in zip(self.convnext, state.waiting[1:]):
            x_BDF, waiting_BDF = block(masked(x_BDF), waiting_BDF, final)
            waiting.append(waiting_BDF)
        if not x_BDF.shape[2]:
            frames_BFN = self.overlap.window_N.new_zeros(len(x_BDF), 0, self.mel.fft_samples)
        else:
            frames_BFN = self._frames(x_BDF)
        wav_BS, overlap = self.overlap.step(frames_BFN, state.overlap, valid_BF=valid_BF, final=final)
        return wav_BS, VocosState(tuple(waiting), overlap)

    def _frames(self, x_BDF: torch.Tensor) -> torch.Tensor:
        """What the last block makes -> the samples under each frame's window `[B, F, fft_samples]`; in float32, since a
        phase of several turns has no digits left in bfloat16."""
        with torch.autocast(x_BDF.device.type, enabled=False):
            level_BFH, phase_BFH = self.out(self.final_layer_norm(x_BDF.float().transpose(1, 2))).chunk(2, 2)
        spectrum_BFH = torch.polar(level_BFH.clamp(max=math.log(LARGEST_MAGNITUDE)).exp(), phase_BFH)
        return torch.fft.irfft(spectrum_BFH, n=self.mel.fft_samples)
