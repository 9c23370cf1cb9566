"""The objective of a vocoder: the distance of log-mels, and discriminators that learn beside it (Siuzdak, 2023, section 3.3).

One loss, one backward pass, one optimizer. The discriminators' loss hears the made sound detached, so it reaches them
alone; the vocoder's hears it through frozen discriminators, so it reaches the vocoder alone. Their sum therefore has both
gradients at once, both of the weights before the step, where HiFi-GAN and Vocos take turns.

Hinge losses, feature matching and the weights 45 : 1 : 0.1 of mel, discriminators by period and by window are those of
the Vocos paper and its public configuration; here all are divided by 45, so that the mel's weight is 1.
Trap: the trainer clips the gradient of all parameters jointly. Whoever has the larger gradient decides how much the other
learns while clipping is at work; AdamW does not see a constant scale, but it does see one that changes from step to
step. With the mel's weight at 1 both are of one order: in the first steps on speech at the published sizes the norm was 3
to 7 for the vocoder and 0.02 to 14 for the discriminators, with small ones 3 to 5 and 0.02 to 11. A `clip` of 20 then
holds bursts alone; 1 would always be at work.

Axis letters: B rows, S samples, M mel bands, F frames, N scores of one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from speechquilt.decoder.discriminators import DiscriminatorsConfig, Judgement
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.vocos import VocosConfig
from speechquilt.types import WaveBatch


@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """Discriminators beside the distance of mels, which alone leaves a buzz: it says nothing of phases."""

    discriminators: DiscriminatorsConfig = DiscriminatorsConfig()
    """Which they are, and how large."""
    after: int = 0
    """Steps with the distance of mels alone before they begin, in which weight decay is all that moves them. More: a
    calmer start, and buzz that has to be unlearnt."""
    weight: float = 1 / 45
    """Of what the discriminators say, score and feature matching together, beside 1 for the distance of mels. More:
    sharper sound, less like the mel."""
    window_weight: float = 0.1
    """Of the discriminators by window beside 1 for those by period."""
    discriminator_weight: float = 1.0
    """Of the discriminators' own loss. AdamW hardly sees it; when the common gradient is clipped, it decides whose counts."""

    def __post_init__(self) -> None:
        if self.after < 0:
            raise ValueError(f"after={self.after} must be at least 0, it counts steps")
        for key in ("weight", "window_weight", "discriminator_weight"):
            if getattr(self, key) <= 0:
                raise ValueError(
                    f"{key}={getattr(self, key)} must be above 0; to train without discriminators, set gan to none"
                )


@dataclass(frozen=True)
class GanLosses:
    """Summed over rows, each a mean over scores or features and then a weighted one over discriminators.

    `fooling` and `matching` have a gradient to the vocoder alone, `judging` to the discriminators alone. `told_apart`: mean
    score of recorded sound minus that of made sound; 0 when they have no idea.
    """

    fooling: torch.Tensor
    matching: torch.Tensor
    judging: torch.Tensor
    told_apart: torch.Tensor


class VocoderGAN(nn.Module):
    """A vocoder with what it is trained by. `loss_mels`: whose distances are averaged; `gan` None: no discriminators."""

    def __init__(self, vocoder: VocosConfig, loss_mels: Sequence[MelConfig], gan: GanConfig | None) -> None:
        super().__init__()
        self.gan = gan
        self.generator = vocoder.build()
        self.mel = vocoder.mel.build()
        self.loss_mels = nn.ModuleList(mel.build() for mel in loss_mels)
        self.discriminators = None if gan is None else gan.discriminators.build()

    def blocks(self) -> list[nn.Module]:
        """What is compiled, part by part. Discriminators are not: each of them, frozen and not, would be a compilation of
        its own, more than torch keeps, and their time goes into convolutions that it leaves as they are."""
        return list(self.generator.convnext)

    def forward(self, wav_BS: torch.Tensor) -> torch.Tensor:
        """Recorded sound -> `[B, S]` made of its mel, S being whole frames."""
        with torch.no_grad(), torch.autocast(wav_BS.device.type, enabled=False):
            mel_BMF = self.mel(wav_BS)
        return self.generator.whole_rows(mel_BMF)

    def mel_distance(self, made_BS: torch.Tensor, wav_BS: torch.Tensor) -> torch.Tensor:
        """`[B]`, in nats: mean over bands, frames and loss mels. In float32, as bfloat16 knows a log-mel to 0.03 alone."""
        with torch.autocast(wav_BS.device.type, enabled=False):
            distances = [(mel(made_BS) - mel(wav_BS)).abs().mean((1, 2)) for mel in self.loss_mels]
        return torch.stack(distances).mean(0)

    def gan_losses(self, made_BS: torch.Tensor, wav_BS: torch.Tensor) -> GanLosses:
        """Raises AssertionError without discriminators."""
        assert self.discriminators is not None
        assert self.gan is not None
        both = self.discriminators(torch.cat([wav_BS, made_BS.detach()]))
        heard = self.discriminators(made_BS, frozen=True)
        rows = len(wav_BS)
        zero = made_BS.new_zeros((), dtype=torch.float32)
        fooling, matching, judging, told_apart = zero, zero, zero, zero
        for weight, all_, made in zip(_shares(self.gan), both, heard):
            real_BN, false_BN = all_.score_BN.float().split(rows)
            judging = judging + weight * (F.relu(1 - real_BN) + F.relu(1 + false_BN)).mean(1).sum()
            fooling = fooling + weight * F.relu(1 - made.score_BN.float()).mean(1).sum()
            matching = matching + weight * _matching(made, all_, rows)
            told_apart = told_apart + (real_BN - false_BN).detach().mean(1).sum() / len(heard)
        return GanLosses(fooling, matching, judging, told_apart)


def vocoder_objective(
    model: VocoderGAN, batch: WaveBatch, batches_before_gan: int = 0
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """-> (summed loss, number of rows, sums of named scalars). Batches before number `batches_before_gan` are without
    discriminators, which then have no gradient.

    Scalars: `mel`, the distance of mels in nats, and, of batches with discriminators, `fooling`, `matching`, `judging` and
    `told_apart` (see `GanLosses`). `judging` near 2 with `told_apart` near 0: they know nothing; near 0: they have won, and
    the vocoder no longer learns from `fooling`.
    """
    wav_BS = batch.wav_BS
    made_BS = model(wav_BS)
    loss = mel = model.mel_distance(made_BS, wav_BS).sum()
    rows = torch.full((), float(len(wav_BS)), device=loss.device)
    scalars = {"mel": mel.detach(), "total_samples": rows * wav_BS.shape[1]}
    if model.gan is not None and batch.number >= batches_before_gan:
        losses = model.gan_losses(made_BS, wav_BS)
        loss = loss + model.gan.weight * (losses.fooling + losses.matching)
        loss = loss + model.gan.discriminator_weight * losses.judging
        named = {name: getattr(losses, name).detach() for name in ("fooling", "matching", "judging", "told_apart")}
        scalars |= named | {f"{name}_weight": rows for name in named}
    return loss, rows, scalars


def _shares(gan: GanConfig) -> list[float]:
    """The weight of each discriminator: a mean over those by period, and `window_weight` of one over those by window."""
    periods, windows = len(gan.discriminators.periods), len(gan.discriminators.windows)
    return [1 / max(1, periods)] * periods + [gan.window_weight / max(1, windows)] * windows


def _matching(made: Judgement, both: Judgement, rows: int) -> torch.Tensor:
    """How far layers are from what they heard of recorded sound: L1, summed over layers and rows."""
    distances = [
        (ours.float() - theirs[:rows].detach().float()).abs().mean() * rows
        for ours, theirs in zip(made.features, both.features)
    ]
    return torch.stack(distances).sum()
