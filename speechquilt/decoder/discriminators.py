"""Discriminators of waveforms, which tell recorded sound from made sound while a vocoder learns.

Two families, as in Vocos (Siuzdak, 2023, section 3.3). *By period* (HiFi-GAN: Kong et al., 2020, section 2.3): samples a
period apart in a column, convolutions along the columns, so that one of them hears what repeats every 2, 3, 5, 7 or 11
samples. *By window* (UnivNet: Jang et al., 2021, section 2.2): convolutions over the magnitudes of a spectrogram, each
with another window. Channels and kernels of the first are HiFi-GAN's, of the second UnivNet's; the windows are those of
the public Vocos configuration, a quarter of a window apart. Magnitudes are divided by the window's sum, a choice: a
network then begins with numbers like a waveform's.
Trap: what a discriminator says of made sound is used twice. Its own loss must not reach the vocoder (detach the sound),
and the vocoder's must not reach the discriminator (`frozen`), or each would help the other to cheat.

Axis letters: B rows, S samples, C channels, F frames, H frequencies, P the period, N scores of one row.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

SLOPE = 0.1  # of a leaky ReLU below 0 (HiFi-GAN)
PERIOD_KERNEL, PERIOD_STRIDE = 5, 3  # along a column (HiFi-GAN)
WINDOW_KERNEL, WINDOW_STRIDE = (3, 9), (1, 2)  # frames by frequencies (UnivNet)
WINDOW_LAYERS = 5  # before the scores (UnivNet)
HOPS = 4  # frames in a window


@dataclass(frozen=True, kw_only=True)
class DiscriminatorsConfig:
    """Which discriminators listen, and how large they are; the defaults have 41 million weights."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """A discriminator for each: it compares samples so many apart. Prime numbers overlap least."""
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    """Channels of their layers; all but the last layer shorten the columns to a third. Fewer: a faster, duller judge."""
    windows: tuple[int, ...] = (512, 1024, 2048)
    """A discriminator for each: samples under the windows of its spectrogram. Short ones hear when, long ones what."""
    window_channels: int = 32
    """Channels of their layers."""

    def __post_init__(self) -> None:
        if not self.periods and not self.windows:
            raise ValueError("periods and windows are both empty; name at least one, or train without discriminators")
        for key in ("periods", "period_channels", "windows"):
            if any(value < 1 for value in getattr(self, key)):
                raise ValueError(f"{key}={getattr(self, key)} must be whole numbers of at least 1")
        if self.periods and not self.period_channels:
            raise ValueError("period_channels is empty; give the channels of at least one layer")
        if any(window % HOPS for window in self.windows):
            raise ValueError(f"windows={self.windows} must be multiples of {HOPS}, the frames in a window")
        if self.window_channels < 1:
            raise ValueError(f"window_channels={self.window_channels} must be at least 1")

    def build(self) -> "Discriminators":
        return Discriminators(self)


@dataclass(frozen=True)
class Judgement:
    """What one discriminator says: `score_BN`, above 0 for what it takes for recorded, and what each of its layers heard,
    `[B, C, ...]`, the scores last."""

    score_BN: torch.Tensor
    features: tuple[torch.Tensor, ...]


class Discriminators(nn.Module):
    """All of them side by side: those by period first, then those by window."""

    def __init__(self, config: DiscriminatorsConfig) -> None:
        super().__init__()
        self.config = config
        self.by_period = nn.ModuleList(PeriodDiscriminator(config, period) for period in config.periods)
        self.by_window = nn.ModuleList(WindowDiscriminator(config, window) for window in config.windows)

    def forward(self, wav_BS: torch.Tensor, *, frozen: bool = False) -> list[Judgement]:
        """`frozen`: the same judgements, with a gradient to the sound and none to any weight here."""
        return [judge(wav_BS, frozen) for judge in (*self.by_period, *self.by_window)]


class PeriodDiscriminator(nn.Module):
    """Samples in columns, every `period`-th in the same one."""

    def __init__(self, config: DiscriminatorsConfig, period: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, *config.period_channels)
        last = len(widths) - 2
        self.stack = ConvStack(
            [
                NormedConv(a, b, (PERIOD_KERNEL, 1), (PERIOD_STRIDE if i < last else 1, 1))
                for i, (a, b) in enumerate(pairwise(widths))
            ],
            NormedConv(widths[-1], 1, (3, 1), (1, 1)),
        )

    def forward(self, wav_BS: torch.Tensor, frozen: bool) -> Judgement:
        missing = -wav_BS.shape[1] % self.period
        columns_B1FP = F.pad(wav_BS[:, None], (0, missing), mode="reflect").unflatten(2, (-1, self.period))
        return self.stack(columns_B1FP, frozen)


class WindowDiscriminator(nn.Module):
    """Magnitudes of a spectrogram with windows of so many samples."""

    window_S: torch.Tensor

    def __init__(self, config: DiscriminatorsConfig, window: int) -> None:
        super().__init__()
        self.register_buffer("window_S", torch.hann_window(window), persistent=False)
        width = config.window_channels
        strides = [(1, 1), *[WINDOW_STRIDE] * (WINDOW_LAYERS - 2), (1, 1)]
        kernels = [*[WINDOW_KERNEL] * (WINDOW_LAYERS - 1), (3, 3)]
        self.stack = ConvStack(
            [NormedConv(width if i else 1, width, k, s) for i, (k, s) in enumerate(zip(kernels, strides))],
            NormedConv(width, 1, (3, 3), (1, 1)),
        )

    def forward(self, wav_BS: torch.Tensor, frozen: bool) -> Judgement:
        num_points = len(self.window_S)
        spectrum_BHF = torch.stft(
            wav_BS.float(), num_points, num_points // HOPS, window=self.window_S, center=True, return_complex=True
        )
        level_B1FH = (spectrum_BHF.abs() / self.window_S.sum()).mT[:, None]
        return self.stack(level_B1FH, frozen)


class ConvStack(nn.Module):
    """Convolutions with leaky ReLUs between them; the last one scores."""

    def __init__(self, layers: list["NormedConv"], scoring: "NormedConv") -> None:
        super().__init__()
        self.layers, self.scoring = nn.ModuleList(layers), scoring

    def forward(self, x_BCFH: torch.Tensor, frozen: bool) -> Judgement:
        features = []
        for layer in self.layers:
            x_BCFH = F.leaky_relu(layer(x_BCFH, frozen), SLOPE)
            features.append(x_BCFH)
        score_B1FH = self.scoring(x_BCFH, frozen)
        return Judgement(score_B1FH.flatten(1), (*features, score_B1FH))


class NormedConv(nn.Module):
    """A convolution that keeps its size, strides apart, whose filters learn length and direction apart (Salimans and Kingma,
    2016). The lengths are one number per filter, so weight decay leaves them alone."""

    def __init__(self, width_in: int, width_out: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, (kernel[0] // 2, kernel[1] // 2))
        self.length = nn.Parameter(self.conv.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x_BCFH: torch.Tensor, frozen: bool) -> torch.Tensor:
        scale_C = self.length / self.conv.weight.flatten(1).norm(dim=1)
        weight, bias = self.conv.weight * scale_C[:, None, None, None], self.conv.bias
        assert bias is not None
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        return F.conv2d(x_BCFH, weight, bias, self.conv.stride, self.conv.padding)
