"""A vocoder with discriminators that is trained in seconds, and a corpus of tones on disk for it."""

import json
from pathlib import Path

import numpy as np

from speechquilt import audio
from speechquilt.data.feed.sound_crops import CropsConfig
from speechquilt.decoder.discriminators import DiscriminatorsConfig
from speechquilt.decoder.mel import MelConfig
from speechquilt.decoder.vocos import VocosConfig
from speechquilt.stages.train_vocoder import VocoderRecipe
from speechquilt.train.objectives.vocoder_gan import GanConfig
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import Waveform

RATE = 8000
MEL = MelConfig(sample_rate=RATE, num_mels=20, fft_samples=128, hop=32, high_hz=4000.0)
JUDGES = DiscriminatorsConfig(periods=(2, 3), period_channels=(4, 8), windows=(64, 128), window_channels=4)
RECIPE = VocoderRecipe(
    vocoder=VocosConfig(mel=MEL, width=24, ffn_width=48, num_layers=2),
    loss_mels=(MEL, MelConfig(sample_rate=RATE, num_mels=30, fft_samples=256, hop=64, high_hz=4000.0)),
    gan=GanConfig(discriminators=JUDGES),
    crops=CropsConfig(samples=1024, rows=4),
    train=TrainConfig(steps=8, lr=3e-3, warmup_steps=2, log_every=2, checkpoint_every=4, num_threads=1, seed=3),
    held_out_recordings=2,
)


def tone(number: int, seconds: float, rate: int = RATE) -> Waveform:
    """A voice-like sum of harmonics that swells and falls."""
    time_S = np.arange(round(seconds * rate)) / rate
    pitch = 90 + 25 * (number % 7)
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time_S) / k for k in range(1, 8))
    samples_S = 0.2 * harmonics * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time_S))
    return Waveform(samples_S=samples_S.astype(np.float32), sample_rate=rate)


def write_tones(folder: Path, count: int = 12, rate: int = RATE) -> Path:
    """Without transcripts, half a second to one second each."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        audio.save(folder / f"{number:02d}.wav", tone(number, 0.5 + 0.05 * (number % 10), rate))
        rows.append({"file_name": f"{number:02d}.wav"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
