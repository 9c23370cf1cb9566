"""Train a vocoder of the Vocos family on recordings, with discriminators or without, and measure it on held-out ones.

No transcripts are needed, and no tokens: a vocoder hears mels alone, so one serves every tokenizer whose decoder has that mel.
Trap: the distance of mels is no quality. A vocoder without discriminators comes near to the mel and buzzes; listen, or let
a recogniser read.

Axis letters: B rows, S samples, M mel bands, F frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.feed.sound_crops import CropLoader, CropsConfig
from speechquilt.data.sources.speech_corpora import SpeechCorpus
from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.vocos import VocosConfig
from speechquilt.evals.measures import Measure
from speechquilt.protocols import Vocoder
from speechquilt.stages.corpus import HELD_OUT_EVERY
from speechquilt.train import distributed
from speechquilt.train.objectives.vocoder_gan import GanConfig, VocoderGAN, vocoder_objective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import Reject, Waveform

MEASURED_S = 10.0  # of a recording, from its start

MEASURES = (
    Measure(key="vocoder.mel_distance", kind="amount", unit="nats", meaning="distance of the mel of what the vocoder makes of held-out recordings' mel from that mel, L1"),
    Measure(key="vocoder.mel_distance_phase", kind="amount", unit="nats", meaning="the same of the phase vocoder, which needs no training"),
    Measure(key="vocoder.held_out_s", kind="amount", unit="s", meaning="held-out audio behind both"),
    Measure(key="vocoder.left_out", kind="count", meaning="recordings that could not be used"),
    Measure(key="vocoder.train_s", kind="amount", unit="s", meaning="audio that pieces were cut out of"),
    Measure(key="vocoder.steps", kind="count", meaning="training steps of the vocoder"),
    Measure(key="vocoder.parameters", kind="count", meaning="parameters of the vocoder, without its discriminators"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VocoderRecipe:
    """How a vocoder is trained."""

    vocoder: VocosConfig
    """Sizes of the vocoder, and the mel that it hears; a speech decoder's flow must make the same mel."""
    train: TrainConfig
    """The run: its steps, learning rate and checkpoints."""
    loss_mels: tuple[MelConfig, ...] = (MelConfig(num_mels=100, high_hz=11_025.0),)
    """Mels whose distances are averaged; they may reach higher or be finer than the vocoder's own. Several windows: each
    phase is asked for at several places, which is what makes a voice without discriminators."""
    gan: GanConfig | None = None
    """Discriminators beside it: natural sound, ten times the work. None: the distance of mels alone, for small machines."""
    crops: CropsConfig = CropsConfig()
    """How batches are cut out of recordings."""
    held_out_recordings: int = 50
    """Most recordings that are measured on; one in twenty is held out whatever it says."""

    def __post_init__(self) -> None:
        mel = self.vocoder.mel
        if not self.loss_mels:
            raise ValueError("loss_mels is empty; name at least one mel, for example that of the vocoder")
        if wrong := [m.sample_rate for m in self.loss_mels if m.sample_rate != mel.sample_rate]:
            raise ValueError(
                f"loss_mels have sample_rate={wrong[0]}, the vocoder makes {mel.sample_rate} Hz; give all the same"
            )
        if self.crops.samples % mel.hop:
            raise ValueError(f"crops.samples={self.crops.samples} must be whole frames, a multiple of hop={mel.hop}")
        widest = max(m.fft_samples for m in (mel, *self.loss_mels))
        if self.gan is not None:
            widest = max(widest, *self.gan.discriminators.windows, *self.gan.discriminators.periods)
            if self.gan.after >= self.train.steps:
                raise ValueError(
                    f"gan.after={self.gan.after} must be below train.steps={self.train.steps}; to train without "
                    "discriminators, set gan to none"
                )
        if self.crops.samples <= widest:
            raise ValueError(f"crops.samples={self.crops.samples} must be more than {widest}, the longest window")
        if self.train.shard != "none":
            raise ValueError(
                f"train.shard={self.train.shard!r} is not for a vocoder, which fits on every GPU; set it to none"
            )
        if self.held_out_recordings < 1:
            raise ValueError(f"held_out_recordings={self.held_out_recordings} must be at least 1")

    def build(self) -> VocoderGAN:
        """Vocoder and discriminators with weights drawn from the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            return VocoderGAN(self.vocoder, self.loss_mels, self.gan)


def train_vocoder(recipe: VocoderRecipe, corpus: SpeechCorpus, folder: Path) -> dict[str, Any]:
    """Train on all but one in twenty recordings, save the vocoder to `folder`, return flat results (`vocoder.*`).

    Goes on from where it stopped. Under torchrun every rank gets the same corpus, and rank 0 writes. Raises ValueError when
    fewer than two recordings can be used.
    """
    held_out, numbers = held_out_numbers(len(corpus))
    loader = CropLoader(
        corpus,
        recipe.crops,
        recipe.vocoder.mel.sample_rate,
        seed=recipe.train.seed,
        numbers=numbers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    if loader.rejects and distributed.rank() == 0:
        print(f"  {len(loader.rejects)} recordings left out: {loader.reject_summary()}")
    model = recipe.build()
    first = recipe.gan.after * recipe.train.accumulate if recipe.gan else 0
    objective = partial(vocoder_objective, batches_before_gan=first)
    try:
        Trainer(recipe.train, model, objective, loader, folder, name="vocoder").train()
    finally:
        loader.close()
    vocoder = model.generator.eval().to("cpu")
    if distributed.rank() == 0:
        vocoder_folder.save(vocoder, folder)
    return {
        "vocoder.steps": recipe.train.steps,
        "vocoder.parameters": sum(p.numel() for p in vocoder.parameters()),
        "vocoder.train_s": loader.seconds,
        "vocoder.left_out": len(loader.rejects),
        **measure_vocoder(vocoder, corpus, held_out, recipe.held_out_recordings),
    }


def held_out_numbers(num_recordings: int) -> tuple[list[int], list[int]]:
    """Which recordings are measured on, one in twenty or one at least, and which are trained on."""
    every = max(2, min(HELD_OUT_EVERY, num_recordings))
    held_out = list(range(0, num_recordings, every))
    return held_out, [number for number in range(num_recordings) if number % every]


def measure_vocoder(vocoder: Vocoder, corpus: SpeechCorpus, numbers: Sequence[int], most: int) -> dict[str, float]:
    """How far the mels of made sound are from what it was made of, beside the phase vocoder's; {} when none can be heard."""
    phase = PhaseVocoderConfig(mel=vocoder.mel).build()
    mel = vocoder.mel.build()
    off, off_phase, frames = 0.0, 0.0, 0
    for _, (_, mel_MF) in zip(range(most), held_out_mels(corpus, numbers, vocoder.mel)):
        off += mel_distance(vocoder, mel, mel_MF) * mel_MF.shape[1]
        off_phase += mel_distance(phase, mel, mel_MF) * mel_MF.shape[1]
        frames += mel_MF.shape[1]
    if not frames:
        return {}
    return {
        "vocoder.mel_distance": off / frames,
        "vocoder.mel_distance_phase": off_phase / frames,
        "vocoder.held_out_s": frames / vocoder.mel.frame_rate,
    }


def held_out_mels(
    corpus: SpeechCorpus, numbers: Sequence[int], config: MelConfig
) -> Iterator[tuple[Waveform, torch.Tensor]]:
    """The start of each usable recording and its mel; what is broken or shorter than a window is passed over."""
    mel = config.build()
    for number in numbers:
        if isinstance(corpus.entry(number), Reject):
            continue
        try:
            recording = audio.resample(audio.check(corpus[number].audio), config.sample_rate)
        except (ValueError, OSError):
            continue
        samples_S = recording.samples_S[: int(MEASURED_S * config.sample_rate)]
        if len(samples_S) > config.fft_samples:
            yield (
                Waveform(samples_S=samples_S, sample_rate=config.sample_rate),
                mel(torch.from_numpy(np.ascontiguousarray(samples_S))[None])[0],
            )


@torch.no_grad()
def mel_distance(vocoder: Any, mel: torch.nn.Module, mel_MF: torch.Tensor) -> float:
    """Mean distance in nats of the mel of the sound that a vocoder makes of a mel from that mel."""
    made_BS = vocoder.forward(mel_MF[None], torch.tensor([mel_MF.shape[1]]))
    return float((mel(made_BS)[0] - mel_MF).abs().mean())
