"""`speechquilt generate` on runs of seconds: plain and latent, text and recordings in, text, sound and JSON out, mistakes named."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import speechquilt as sq
from speechquilt import audio, cli, config
from speechquilt.decoder.phase import PhaseVocoderConfig
from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.model.generation import GenerationConfig
from speechquilt.stages.generate_lm import load_engine, text_behind
from speechquilt.stages.train_lm import LMRun, load_scorer
from speechquilt.text import TextTokenizer
from speechquilt.types import Waveform
from tests.contracts import tiny_tokenizer
from tests.dummies import base_text_tokenizer
from tests.e2e.test_seams import TINY_LM, World, refused, run, world  # noqa: F401 (a fixture)
from tests.parity.tiny_tokenizers import noise
from tests.unit.tiny_flow import MEL, tiny

ROW = 256  # tokens of TINY_LM


@dataclass(frozen=True, kw_only=True)
class Runs:
    """A latent and a plain run, a decoder of their tokenizer, and one recording."""

    root: Path
    latent: Path
    plain: Path
    decoder: Path
    recording: Path


def save_decoder(folder: Path, **changes: Any) -> Path:
    flow = tiny(**{"codebook_size": tiny_tokenizer.CONFIG.codebook_size, **changes})
    SpeechDecoder(flow, PhaseVocoderConfig(mel=MEL, rounds=1, frames_ahead=1).build()).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Runs:  # noqa: F811
    root = tmp_path_factory.mktemp("runs")
    ours = tiny_tokenizer.build()
    ours.save(root / "tokenizer")
    words = ["--tokenizer", root / "tokenizer", "--workers", 1]
    commands: list[list[object]] = [
        ["tokenize", world.speech, root / "shards", *words],
        ["text", world.text, root / "shards" / "text", *words],
    ]
    data = [f"{source}={root / 'shards' / source}" for source in ("speech", "asr", "text", "parallel")]
    for kind, patcher in (("latent", "curriculum"), ("plain", "none")):
        named = ["--kind", kind, "--patcher.kind", patcher, "--run-dir", root / kind]
        commands.append(["train", "lm", "--data", *data, *words[:2], *TINY_LM, *named])
    for command in commands:
        assert cli.main([str(word) for word in command]) == 0
    recording = root / "question.wav"
    audio.save(recording, Waveform(samples_S=noise(7, 2.0).numpy().clip(-1, 1), sample_rate=16000))
    decoder = save_decoder(root / "decoder", tokenizer=ours.fingerprint)
    return Runs(root=root, latent=root / "latent", plain=root / "plain", decoder=decoder, recording=recording)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("kind", ["latent", "plain"])
def test_text_goes_on_in_speech_that_can_be_heard(runs: Runs, kind: str, tmp_path: Path, capsys: Any) -> None:
    lm, out = getattr(runs, kind), tmp_path / "out"
    command = ["generate", lm, "--text", "the cat", "--answer", "speech", "--max-tokens", 30, "--temperature", 1]
    said = run(capsys, *command, "--decoder", runs.decoder, "--number", 4, "--out", out)
    size = config.load(LMRun, lm / "run.json").patcher.patch_size if kind == "latent" else 1
    found = result(out)
    assert found["prompt"] == {"text": "the cat", "audio": None, "tokens": {"text": 2}}
    assert found["settings"] == {
        **config.to_dict(GenerationConfig(answer="speech", max_tokens=30, temperature=1.0)),
        "number": 4,
    }
    decoder = sq.load_decoder(runs.decoder)
    ours = sq.load_tokenizer(runs.root / "tokenizer")
    heard = 0
    for i, row in enumerate(found["continuations"]):
        assert row["global_steps"] == (row["tokens"] - (row["ended"] == "limit")) // size
        assert [span["modality"] for span in row["segments"]] in ([], ["speech"])
        for span in row["segments"]:
            assert len(span["ids"]) == row["tokens"] <= 30
            assert span["seconds"] == len(span["ids"]) / 12.5
            assert span["read_back"] == ours.read_back([np.array(span["ids"])])[0]  # type: ignore[attr-defined]
            assert f'[speech {span["seconds"]:.1f} s: "{span["read_back"]}"]' in said
            expected = sq.speak(decoder, np.array(span["ids"]))
            wave = audio.load(out / f"continuation_{i}.wav")
            assert row["audio"] == f"continuation_{i}.wav"
            assert (wave.sample_rate, wave.duration_s) == (22050, expected.duration_s)
            assert np.abs(wave.samples_S - expected.samples_S).max() < 1e-3
            heard += 1
    assert heard
    assert len({str(row["segments"]) for row in found["continuations"]}) > 1
    said = run(capsys, *command, "--out", tmp_path / "alone")  # without a decoder, and of the same draws
    assert "--decoder FOLDER" in said
    (alone,) = result(tmp_path / "alone")["continuations"]
    assert {**alone, "audio": "continuation_0.wav"} == found["continuations"][0]
    assert not list((tmp_path / "alone").glob("*.wav"))


@pytest.mark.parametrize("kind", ["latent", "plain"])
def test_a_recording_goes_on_as_the_engine_says(runs: Runs, kind: str, tmp_path: Path, capsys: Any) -> None:
    """In both modalities, and in text behind the recording and a text."""
    lm, ours = getattr(runs, kind), sq.load_tokenizer(runs.root / "tokenizer")
    ids_T = sq.tokenize(ours, runs.recording)
    run(capsys, "generate", lm, "--audio", runs.recording, "--max-tokens", 25, "--out", tmp_path)
    spans = result(tmp_path)["continuations"][0]["segments"]
    assert result(tmp_path)["prompt"]["tokens"] == {"speech": 25}
    model = sq.load_lm(lm)
    parts = sq.generate(model, ids_T, max_tokens=25)
    assert [p if isinstance(p, str) else p.tolist() for p in parts] == [s.get("text", s["ids"]) for s in spans]
    run(
        capsys,
        "generate",
        lm,
        "--audio",
        runs.recording,
        "--text",
        "the",
        "--answer",
        "text",
        "--max-tokens",
        20,
        "--out",
        tmp_path,
    )
    for nothing in ("", [], ["the", ids_T[:0]]):
        with pytest.raises(ValueError, match="the prompt is empty"):
            sq.generate(model, nothing)
    found = result(tmp_path)
    assert found["prompt"]["tokens"] == {"speech": 25, "text": 1}
    (row,) = found["continuations"]
    assert {s["modality"] for s in row["segments"]} <= {"text"}
    assert sq.generate(model, [ids_T, "the"], answer="text", max_tokens=20) == [s["text"] for s in row["segments"]]


def test_text_alone_needs_no_speech_tokenizer(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    lm = tmp_path / "lm"
    shutil.copytree(runs.latent, lm)
    shutil.rmtree(lm / "tokenizer")
    noted = config.to_dict(config.load(LMRun, lm / "run.json")) | {"tokenizer": "../moved"}
    (lm / "run.json").write_text(json.dumps(noted))
    run(capsys, "generate", lm, "--text", "the cat sat", "--answer", "text", "--max-tokens", 5)
    command = ["generate", lm, "--text", "the cat sat", "--max-tokens", 5]
    assert "--tokenizer FOLDER" in refused(capsys, *command)
    run(capsys, *command, "--tokenizer", runs.root / "tokenizer")


def test_a_run_remembers_its_rows_and_is_held_to_them(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    engine, noted = load_engine(runs.latent)
    assert (noted.tokens_per_row, noted.units_per_row) == (engine.row_tokens, engine.row_units) == (ROW, 128)
    assert load_scorer(runs.latent)[0].engine.row_tokens == 0  # what is measured is as before
    many = ["generate", runs.plain, "--text", "the cat " * 55, "--answer", "text", "--max-tokens", 1000]
    said = run(capsys, *many, "--temperature", 1.5, "--number", 2, "--out", tmp_path)
    ended = {row["ended"] for row in result(tmp_path)["continuations"]}
    assert ended <= {"row", "eos"}
    assert ("is full" in said) == ("row" in ended)
    long = tmp_path / "long.wav"
    audio.save(long, Waveform(samples_S=np.zeros(16000 * 60, dtype=np.float32), sample_rate=16000))
    said = refused(capsys, "generate", runs.plain, "--audio", long)
    assert "lasts 60.0 s, the model was trained on rows of 256 tokens, 20.5 s of speech" in said
    assert "shorter" in refused(capsys, "generate", runs.plain, "--text", "the cat " * 200)  # by tokens
    said = refused(capsys, "generate", runs.latent, "--text", "the cat " * 63)  # by units, of which there are fewer
    assert "rows of 128" in said
    older = tmp_path / "older"
    shutil.copytree(runs.plain, older)
    kept = {k: v for k, v in config.to_dict(noted).items() if not k.endswith("_per_row")}
    (older / "run.json").write_text(json.dumps(kept | {"patcher": {"kind": "none"}}))
    run(capsys, "generate", older, "--text", "the cat " * 70, "--max-tokens", 2)


def test_mistakes_are_named(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    text = ["generate", runs.latent, "--text", "the cat"]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    other = save_decoder(tmp_path / "other", tokenizer="another")
    larger = save_decoder(tmp_path / "larger", codebook_size=30)
    faster = save_decoder(tmp_path / "faster", token_rate=25.0)
    story = tmp_path / "story"
    shutil.copytree(runs.latent, story / "lm" / "latent")
    out = ["--out", tmp_path / "out"]
    for command, message in (
        (["generate", runs.latent], "give --text, --audio, or both"),
        (["generate", runs.latent, "--text", "  "], "without audio is nothing to go on from"),
        (["generate", runs.latent, "--audio", tmp_path / "no.wav"], "no.wav is missing"),
        (["generate", runs.latent, "--audio", broken], "cannot be read as audio"),
        (["generate", tmp_path, "--text", "the"], "give a finished run of `train lm`"),
        (["generate", story, "--text", "the"], f"it holds {story / 'lm' / 'latent'}"),
        ([*text, "--number", 0], "number=0 must be at least 1"),
        ([*text, "--number", 2], "--temperature above 0"),
        ([*text, "--decoder", runs.decoder], "give --out FOLDER"),
        ([*text, "--decoder", runs.decoder, "--answer", "text", *out], "no speech may come"),
        ([*text, "--decoder", tmp_path / "nowhere", *out], "nowhere"),
        ([*text, "--decoder", other, *out], "was trained on those of another"),
        ([*text, "--decoder", larger, *out], "codebook_size=30"),
        ([*text, "--decoder", faster, *out], "token_rate=25.0"),
        ([*text, "--tokenizer", tmp_path / "nowhere"], "--tokenizer FOLDER"),
        ([*text, "--top-p", 2], "top_p=2.0 must lie in (0, 1]"),
        ([*text, "--device", "abacus"], "device='abacus'"),
        ([*text, "--answer", "song"], "--answer"),
        ([*text, "--out", broken], "broken.wav"),
    ):
        assert message in " ".join(refused(capsys, *command).split()), command
    assert not (tmp_path / "out").exists()


def test_a_run_of_text_alone_says_so(runs: Runs, tmp_path: Path, capsys: Any) -> None:
    """As a run from Python, which needs no speech tokenizer."""
    lm = tmp_path / "lm"
    shutil.copytree(runs.plain, lm)
    noted = config.to_dict(config.load(LMRun, lm / "run.json")) | {"num_speech": 0, "speech_fingerprint": ""}
    (lm / "run.json").write_text(json.dumps(noted))
    assert "trained on text alone" in refused(capsys, "generate", lm, "--audio", runs.recording)
    assert "no speech tokens" in refused(capsys, "generate", lm, "--text", "the cat", "--answer", "speech")
    run(capsys, "generate", lm, "--text", "the cat", "--max-tokens", 5)


def test_text_goes_on_inside_a_word_or_behind_its_space() -> None:
    texts = ["the cat sat on the mat"] * 4
    for tokenizer in (TextTokenizer.train(texts, 300), base_text_tokenizer(texts)):
        ids = tokenizer.encode("the cat sat on")
        for k in range(1, len(ids)):
            whole = tokenizer.decode(ids[:k]) + text_behind(tokenizer, ids[:k], ids[k:])
            assert whole == "the cat sat on"
    assert text_behind(tokenizer, [], ids).strip() == "the cat sat on"
