"""HiFT, the vocoder of CosyVoice and GLM-4-Voice: pitch from the mel, a source of its harmonics, and a network that shapes
it into the spectra of short windows (Li, Han and Mesgarani, 2023; spec 1, 3.1). For inference.

A stream carries the phase of the pitch and computes its new frames with as many around them as can change them, so it
gives what the whole utterance would have given.
Trap: the official source draws from the global generator at every call. Here noise is a function of (seed, frame) and the
harmonics' phases of the seed, so the same mel is the same sound.

Axis letters: B rows, M mel bands, F frames, D width, L frames of the short windows, C real and imaginary parts, S samples,
H harmonics.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.vocoder_rows import check_frames, rows_alone

LARGEST_MAGNITUDE = 100.0
PITCH_LAYERS = 5  # convolutions of kernel 3: a frame's pitch depends on this many frames to either side
END_KERNEL = 7  # of the first and the last convolution
LAST_SLOPE = 0.01  # of the leaky ReLU before the last convolution, whatever that of the others
Dilations = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HiftConfig:
    """Sizes and settings; the defaults are those of the released checkpoints."""

    mel: MelConfig = MelConfig()
    """The frames it takes."""
    width: int = 512
    """Channels before the first upsampling layer; each halves them."""
    pitch_width: int = 512
    """Channels of the network that hears the pitch."""
    num_harmonics: int = 8
    """Overtones of the source beside the fundamental."""
    upsample_rates: tuple[int, ...] = (8, 8)
    """Of each upsampling layer; with `short_hop` they multiply to the hop of the mel."""
    upsample_kernels: tuple[int, ...] = (16, 16)
    """Of the same layers."""
    short_points: int = 16
    """Points of the short Fourier transforms."""
    short_hop: int = 4
    """Samples from one short window to the next."""
    block_kernels: tuple[int, ...] = (3, 7, 11)
    """Of the residual blocks side by side after each upsampling layer."""
    block_dilations: Dilations = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    """Of the same blocks."""
    source_kernels: tuple[int, ...] = (7, 11)
    """Of the residual block on the source, one for each upsampling layer."""
    source_dilations: Dilations = ((1, 3, 5), (1, 3, 5))
    """Of the same blocks."""
    sine_level: float = 0.1
    """Amplitude of the source's sines; a third of it is the noise where there is no voice."""
    noise_level: float = 0.003
    """Noise beside the sines."""
    voiced_hz: float = 10.0
    """A pitch above it is a voice."""
    slope: float = 0.1
    """Of the leaky ReLUs before the upsampling layers."""
    limit: float = 0.99
    """Largest sample."""
    seed: int = 0
    """Of noise and phases."""

    def __post_init__(self) -> None:
        made = math.prod(self.upsample_rates) * self.short_hop
        if made != self.mel.hop:
            raise ValueError(f"upsample_rates={self.upsample_rates} and short_hop={self.short_hop} make {made} samples of a frame; mel.hop={self.mel.hop} must be the same")  # fmt: skip
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"upsample_kernels: {kernel} must exceed its rate {rate} by an even number")

    def build(self) -> "Hift":
        return Hift(self)


@dataclass(frozen=True)
class HiftState:
    """`mel_MF`: the frames that are still needed; `source_S`: the source of the first of them; `num_done`: how many of
    them are sound already; `num_before`: frames before these; `turns`: phase of the pitch where the source ends, in
    [0, 1)."""

    mel_MF: torch.Tensor
    source_S: torch.Tensor
    num_done: int = 0
    num_before: int = 0
    turns: float = 0.0


class Snake(nn.Module):
    """x + sin(alpha x)^2 / alpha, alpha per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x_BDL: torch.Tensor) -> torch.Tensor:
        alpha_D1 = self.alpha[:, None]
        return x_BDL + (alpha_D1 * x_BDL).sin().square() / (alpha_D1 + 1e-9)


class ResidualBlock(nn.Module):
    """Pairs of convolutions, the first of each dilated, with a Snake before each."""

    def __init__(self, width: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        half = kernel // 2
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=half * d) for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=half) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(width) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(width) for _ in dilations)

    def forward(self, x_BDL: torch.Tensor) -> torch.Tensor:
        for conv1, conv2, snake1, snake2 in zip(self.convs1, self.convs2, self.activations1, self.activations2):
            x_BDL = x_BDL + conv2(snake2(conv1(snake1(x_BDL))))
        return x_BDL


class PitchPredictor(nn.Module):
    """Mel frames -> Hz of the voice, of each frame."""

    def __init__(self, num_mels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(PITCH_LAYERS):
            layers += [nn.Conv1d(width if i else num_mels, width, 3, padding=1), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel_BMF: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.condnet(mel_BMF).transpose(1, 2))[..., 0].abs()


class HarmonicMix(nn.Module):
    """Harmonics -> one source."""

    def __init__(self, num_sines: int) -> None:
        super().__init__()
        self.l_linear = nn.Linear(num_sines, 1)

    def forward(self, sines_HS: torch.Tensor) -> torch.Tensor:
        return self.l_linear(sines_HS.T)[:, 0].tanh()


class Hift(nn.Module):
    """The vocoder, as `protocols.Vocoder`. Names of the weights are the official ones, weight norm folded."""

    window_N: torch.Tensor
    phase_H: torch.Tensor

    def __init__(self, config: HiftConfig) -> None:
        super().__init__()
        self.config = config
        self.mel = config.mel
        self.reach = _reach(config)
        self.lookahead_frames = self.reach + PITCH_LAYERS
        parts, num_layers = config.short_points + 2, len(config.upsample_rates)
        widths = [config.width // 2**i for i in range(num_layers + 1)]
        self.f0_predictor = PitchPredictor(config.mel.num_mels, config.pitch_width)
        self.m_source = HarmonicMix(config.num_harmonics + 1)
        self.conv_pre = nn.Conv1d(config.mel.num_mels, config.width, END_KERNEL, padding=END_KERNEL // 2)
        self.ups, self.source_downs, self.source_resblocks, self.resblocks = (nn.ModuleList() for _ in range(4))
        for i, (rate, kernel) in enumerate(zip(config.upsample_rates, config.upsample_kernels)):
            width = widths[i + 1]
            self.ups.append(nn.ConvTranspose1d(widths[i], width, kernel, rate, padding=(kernel - rate) // 2))
            self.source_downs.append(nn.Conv1d(parts, width, *_down(config, i)))
            self.source_resblocks.append(ResidualBlock(width, config.source_kernels[i], config.source_dilations[i]))
            for block_kernel, dilations in zip(config.block_kernels, config.block_dilations):
                self.resblocks.append(ResidualBlock(width, block_kernel, dilations))
        self.conv_post = nn.Conv1d(widths[-1], parts, END_KERNEL, padding=END_KERNEL // 2)
        turns_H = torch.rand(config.num_harmonics + 1, generator=torch.Generator().manual_seed(config.seed))
        turns_H[0] = 0.0
        self.register_buffer("phase_H", 2 * torch.pi * turns_H, persistent=False)
        self.register_buffer("window_N", torch.hann_window(config.short_points), persistent=False)

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        """Right-padded frames -> `wav_BS`, zero past a row's end. Raises ValueError on what is no log-mel."""

        def one(mel_MF: torch.Tensor) -> torch.Tensor:
            return self.step(mel_MF, self.init_state(), final=True)[0]

        return rows_alone(one, mel_BMF, num_frames_B, self.mel)

    def init_state(self) -> HiftState:
        return HiftState(self.window_N.new_zeros(self.mel.num_mels, 0), self.window_N.new_zeros(0))

    @torch.no_grad()
    def step(self, mel_MF: torch.Tensor, state: HiftState, *, final: bool = False) -> tuple[torch.Tensor, HiftState]:
        """Any number of new frames -> the samples that are now certain, and the new state; a fresh one after `final`."""
        hop = self.mel.hop
        mel_MF = torch.cat([state.mel_MF, check_frames(mel_MF, self.mel)], 1)
        source_S, turns = self._sourced(mel_MF, state, mel_MF.shape[1] - (0 if final else PITCH_LAYERS))
        known = len(source_S) // hop
        stop = known - (0 if final else self.reach)
        if stop <= state.num_done:
            kept = HiftState(mel_MF, source_S, state.num_done, state.num_before, turns)
            return source_S.new_zeros(0), self.init_state() if final else kept
        wav_S = self._shaped(mel_MF[:, :known], source_S)[state.num_done * hop : stop * hop]
        first = max(0, stop - max(self.reach, PITCH_LAYERS))
        kept = HiftState(mel_MF[:, first:], source_S[first * hop :], stop - first, state.num_before + first, turns)
        return wav_S, self.init_state() if final else kept

    def _sourced(self, mel_MF: torch.Tensor, state: HiftState, stop: int) -> tuple[torch.Tensor, float]:
        """The source up to frame `stop` of the state's, and the phase of the pitch there."""
        config, hop, turns, parts = self.config, self.mel.hop, state.turns, [state.source_S]
        start = len(state.source_S) // hop
        if stop <= start:
            return state.source_S, turns
        first = max(0, start - PITCH_LAYERS)
        hz_F = self.f0_predictor(mel_MF[None, :, first:])[0, start - first : stop - first].double()
        step_S = torch.arange(1, hop + 1, dtype=torch.double, device=hz_F.device) / self.mel.sample_rate
        order_H1 = torch.arange(1, config.num_harmonics + 2, device=hz_F.device)[:, None]
        for frame, hz in enumerate(hz_F, state.num_before + start):
            angle_HS = 2 * torch.pi * (order_H1 * (turns + hz * step_S) % 1) + self.phase_H[:, None]
            voiced = float(hz) > config.voiced_hz
            noise_HS = self._noise(frame) * (config.noise_level if voiced else config.sine_level / 3)
            sines_HS = config.sine_level * angle_HS.sin().float() * voiced + noise_HS
            parts.append(self.m_source(sines_HS))
            turns = float((turns + hz * hop / self.mel.sample_rate) % 1)
        return torch.cat(parts), turns

    def _noise(self, frame: int) -> torch.Tensor:
        """Gaussian, one channel for each sine."""
        generator = torch.Generator().manual_seed((self.config.seed << 32) + frame)
        return torch.randn(self.config.num_harmonics + 1, self.mel.hop, generator=generator).to(self.window_N.device)

    def _shaped(self, mel_MF: torch.Tensor, source_S: torch.Tensor) -> torch.Tensor:
        """Frames and their source -> their samples, as if nothing lay around them."""
        config, num_blocks = self.config, len(self.config.block_kernels)
        points, short_hop = config.short_points, config.short_hop
        spectrum_KL = torch.stft(source_S, points, short_hop, window=self.window_N, return_complex=True)
        source_BCL = torch.cat([spectrum_KL.real, spectrum_KL.imag])[None]
        x_BDL = self.conv_pre(mel_MF[None])
        for i, up in enumerate(self.ups):
            x_BDL = up(F.leaky_relu(x_BDL, config.slope))
            if i == len(self.ups) - 1:
                x_BDL = F.pad(x_BDL, (1, 0), mode="reflect")  # a centred transform has one window more
            x_BDL = x_BDL + self.source_resblocks[i](self.source_downs[i](source_BCL))
            blocks = self.resblocks[i * num_blocks : (i + 1) * num_blocks]
            x_BDL = torch.stack([block(x_BDL) for block in blocks]).sum(0) / num_blocks
        level_KL, phase_KL = self.conv_post(F.leaky_relu(x_BDL, LAST_SLOPE))[0].chunk(2)
        made_KL = torch.polar(level_KL.clamp(max=math.log(LARGEST_MAGNITUDE)).exp(), phase_KL.sin())
        return torch.istft(made_KL, points, short_hop, window=self.window_N).clamp(-config.limit, config.limit)


def _reach(config: HiftConfig) -> int:
    """Frames of mel and source to either side of its own that can change a frame's samples, found by following the
    samples of one frame back through the layers."""
    hop, half, frame = config.mel.hop, config.short_points // 2, 10_000  # far from both ends
    first = -(-(frame * hop - half + 1) // config.short_hop) - END_KERNEL // 2
    last = ((frame + 1) * hop - 1 + half) // config.short_hop + END_KERNEL // 2
    sampled = []
    for i in reversed(range(len(config.upsample_rates))):
        widest = max(_half_width(k, d) for k, d in zip(config.block_kernels, config.block_dilations))
        first, last = first - widest, last + widest
        beside = _half_width(config.source_kernels[i], config.source_dilations[i])
        kernel, stride, padding = _down(config, i)
        sampled.append(((first - beside) * stride - padding) * config.short_hop - half)
        sampled.append(((last + beside) * stride - padding + kernel - 1) * config.short_hop + half - 1)
        if i == len(config.upsample_rates) - 1:
            first, last = first - 1, last - 1  # the mirrored window at the start
        rate, kernel = config.upsample_rates[i], config.upsample_kernels[i]
        first, last = -(-(first + (kernel - rate) // 2 - kernel + 1) // rate), (last + (kernel - rate) // 2) // rate
    reached = [sample // hop for sample in sampled] + [first - END_KERNEL // 2, last + END_KERNEL // 2]
    return max(frame - min(reached), max(reached) - frame)


def _half_width(kernel: int, dilations: tuple[int, ...]) -> int:
    """How far a residual block sees to either side."""
    return sum(kernel // 2 * (dilation + 1) for dilation in dilations)


def _down(config: HiftConfig, layer: int) -> tuple[int, int, int]:
    """Kernel, stride and padding that bring the source's windows to the length after an upsampling layer."""
    rate = math.prod(config.upsample_rates[layer + 1 :])
    return (2 * rate, rate, rate // 2) if rate > 1 else (1, 1, 0)
