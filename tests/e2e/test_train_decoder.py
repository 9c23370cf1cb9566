"""A speech decoder as a user trains it: from a folder and its shards, killed in between, then heard by two commands."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from speechquilt import audio, cli
from speechquilt.decoder import speech_decoder
from speechquilt.decoder.mel import MelConfig
from speechquilt.jobs.tokenize_audio import tokenize_folder
from speechquilt.stages import train_decoder as stage
from speechquilt.stages.sound_pieces import PiecesConfig, on_disk
from speechquilt.stages.train_decoder import ALL_VOICES, DecoderRecipe
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.trainer import TrainConfig
from tests.contracts.tiny_tokenizer import build
from tests.unit.test_speech_corpora import write_folder
from tests.unit.tiny_flow import tiny_config

TRAIN = TrainConfig(steps=4, lr=1e-3, checkpoint_every=1, log_every=1, num_threads=1)
RECIPE = DecoderRecipe(
    flow=tiny_config(mel=MelConfig(sample_rate=16_000, num_mels=6)),
    pieces=PiecesConfig(rows=2, tokens=8),
    first=replace(TRAIN, steps=2, seed=1),
    train=TRAIN,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`speech`, the `tokenizer` and the `shards` that it made."""
    root = tmp_path_factory.mktemp("decoder")
    (root / "speech").mkdir()
    write_folder(root / "speech")
    build(seed=3).save(root / "tokenizer")
    tokenize_folder(root / "speech", root / "shards", root / "tokenizer")
    return root


def train(made: Path, folder: Path) -> dict:
    tokenizer = SupervisedTokenizer.load(made / "tokenizer")
    speech = on_disk(made / "speech", [made / "shards" / "speech"], tokenizer)
    return stage.train_decoder(RECIPE, tokenizer, speech, folder, one_voice=speech.only([0, 1]))


@pytest.mark.parametrize("killed_at", [1, 4], ids=["in the first run", "in the second"])
def test_a_killed_training_ends_with_the_same_bits(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    whole = train(made, tmp_path / "whole")
    calls, objective = [0], stage.flow_objective

    def dies(*given: object) -> object:
        calls[0] += 1
        if calls[0] > killed_at:
            raise KeyboardInterrupt
        return objective(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(stage, "flow_objective", dies)
        with pytest.raises(KeyboardInterrupt):
            train(made, tmp_path / "killed")
    assert train(made, tmp_path / "killed") == whole
    decoders = [speech_decoder.load(tmp_path / name).flow.state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(decoders[0][name], decoders[1][name]) for name in decoders[0])
    assert (tmp_path / "whole" / ALL_VOICES).is_dir()


def test_the_decoder_knows_its_tokenizer_and_the_scale_of_its_mel(made: Path, tmp_path: Path) -> None:
    found = train(made, tmp_path / "decoder")
    config = speech_decoder.load(tmp_path / "decoder").flow.config
    tokenizer = SupervisedTokenizer.load(made / "tokenizer")
    assert config.tokenizer == tokenizer.fingerprint
    assert (config.codebook_size, config.token_rate) == (tokenizer.vocab_size, tokenizer.frame_rate)
    assert config.mel_std != 1.0
    assert found["decoder.steps"] == 6


def test_from_a_command_to_sound(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "decoder", tmp_path / "out.wav"
    command = [
        "train", "decoder", f"--speech={made / 'speech'}", "--data", f"speech={made / 'shards' / 'speech'}",
        f"--tokenizer={made / 'tokenizer'}", f"--run-dir={folder}", "--train.steps=1", "--train.warmup-steps=0",
        "--train.num-threads=1", "--pieces.rows=1", "--first=none", "--phases.rounds=1",
    ]  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "resynth" in capsys.readouterr().out
    recording = sorted(p for p in (made / "speech").rglob("*") if p.suffix in (".wav", ".flac"))[0]
    parts = [f"--decoder={folder}", f"--tokenizer={made / 'tokenizer'}"]
    assert cli.main(["resynth", str(recording), str(out), *parts]) == 0, capsys.readouterr().err
    heard, meant = audio.load(out), audio.load(recording)
    assert heard.sample_rate == 16_000
    assert abs(heard.duration_s - meant.duration_s) < 0.1
    assert np.abs(heard.samples_S).max() > 0
    build(seed=4).save(tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["resynth", str(recording), str(out), parts[0], f"--tokenizer={tmp_path / 'other'}"]) == 2
    assert "decode with a decoder of the same tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speak", "the cat", "out.wav"], "text_to_token is not set; give --run"),
        (["speak", " ", "out.wav", "--run=nowhere"], "text is empty"),
        (["resynth", "missing.wav", "out.wav", "--run=nowhere"], "missing.wav is missing"),
        (["train", "decoder", "--speech=nowhere"], "tokens are missing: give --data"),
    ],
)
def test_what_is_missing_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(made: Path) -> None:
    with pytest.raises(ValueError, match="give the tokenizer that made them"):
        on_disk(made / "speech", [made / "shards" / "speech"], build(seed=4))
