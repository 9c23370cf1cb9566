"""Word times from the command line: train an aligner on recordings that have none, align all, go on with them.

Recordings are espeak-ng's, so their true word times are known to the tests and to nobody else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from speechquilt import audio, cli
from speechquilt.align import CTCAligner
from speechquilt.data import bulk
from speechquilt.data.corpus import Reject, read_utterances
from speechquilt.data.micro_world import MicroWorldConfig
from speechquilt.data.shards import ShardFolder
from speechquilt.recipes import align as recipe
from speechquilt.recipes.aligner import load_aligner
from speechquilt.recipes.corpus import join, speak
from speechquilt.train.metrics import read_metrics
from speechquilt.tts import EspeakTTSConfig
from speechquilt.types import Utterance
from tests.contracts.test_aligner import wav2vec2_folder

ROOT = Path(__file__).parents[2]
TINY = [
    "recipe.model.num_mels=20", "recipe.model.width=32", "recipe.model.num_heads=2", "recipe.model.ffn_width=64",
    "recipe.model.num_layers=2", "recipe.train.steps=6", "recipe.train.warmup_steps=1", "recipe.train.num_threads=1",
    "recipe.train.log_every=1", "recipe.batch_seconds=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def spoken() -> list[Utterance]:
    speaker = EspeakTTSConfig(voices=("en-us",)).build()
    return speak(speaker, join(MicroWorldConfig().build().sentences(60), 2, seed=0)[:20])


@pytest.fixture(scope="module")
def speech(spoken: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty recordings without word times: transcripts beside them, two folders, several rates."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "more").mkdir()
    for i, utterance in enumerate(spoken):
        path = folder / ("more" if i % 2 else ".") / f"{i:02d}.wav"
        audio.save(path, audio.resample(utterance.audio, (16000, 22050)[i % 2]))
        path.with_suffix(".txt").write_text(utterance.text)
    return folder


@pytest.fixture(scope="module")
def aligner(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "aligner"
    assert cli.main(["train", "aligner", f"speech={speech}", f"run_dir={run}", *TINY]) == 0
    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_recordings_get_the_words_of_the_aligner(speech: Path, aligner: Path, tmp_path: Path) -> None:
    """One row for each recording, in order; its words are those that the aligner gives for the whole recording."""
    assert cli.main(["align", str(speech), str(tmp_path / "out"), "--aligner", str(aligner), "--workers", "1"]) == 0
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == [
        *(f"{i:02d}.wav" for i in range(0, 20, 2)),
        *(f"more/{i:02d}.wav" for i in range(1, 20, 2)),
    ]
    alone = load_aligner(aligner)
    for utterance, row in zip(read_utterances(tmp_path / "out"), found, strict=True):
        assert isinstance(utterance, Utterance)
        assert row["duration"] == pytest.approx(utterance.audio.duration_s, abs=1e-3)
        assert row["text"] == (speech / row["id"]).with_suffix(".txt").read_text()
        expected = alone.align(utterance.audio, utterance.text)
        assert [w.text for w in utterance.alignment] == [w.text for w in expected]
        times = [(w.start_s, w.end_s) for w in utterance.alignment]
        np.testing.assert_allclose(times, [(w.start_s, w.end_s) for w in expected], atol=2e-3)
