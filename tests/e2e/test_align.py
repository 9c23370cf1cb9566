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
import torch
from safetensors.torch import load_file

from speechquilt import audio, cli
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.jobs import align_audio as recipe
from speechquilt.recipes import own
from speechquilt.stages.corpus import join, speak
from speechquilt.stages.train_aligner import load_aligner
from speechquilt.tokenizer import load
from speechquilt.train.metrics import read_metrics
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.types import Utterance, Waveform
from tests.contracts.test_aligner import wav2vec2_folder
from tests.parity import tiny_tokenizers

ROOT = Path(__file__).parents[2]
TINY = [
    "--model.num_mels=20", "--model.width=32", "--model.num_heads=2", "--model.ffn_width=64",
    "--model.num_layers=2", "--train.steps=6", "--train.warmup_steps=1", "--train.num_threads=1",
    "--train.log_every=1", "--batch_seconds=8",
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
    assert cli.main(["train", "aligner", f"--speech={speech}", f"--run-dir={run}", *TINY]) == 0
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


def test_what_cannot_be_aligned_is_counted_and_the_rest_is_kept(speech: Path, aligner: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    table = [{"file_name": str(speech / f"{i:02d}.wav"), "text": "the cat"} for i in range(0, 20, 2)]
    table[0]["words"] = [["the", 0.1, 0.2], ["cat", 0.2, 0.5]]
    (source / "broken.wav").write_bytes(b"this is no audio")
    audio.save(source / "short.wav", Waveform(samples_S=np.full(400, 0.1, np.float32), sample_rate=16000))
    bad = {
        "broken.wav": ("the cat", "cannot be read as audio"),
        "short.wav": ("the cat sat on the mat", "text too long for its audio"),
        "digits.wav": ("1789", "no word in the aligner's alphabet"),
        "missing.wav": ("the cat", "missing file"),
    }
    table += [{"file_name": name, "text": text} for name, (text, _) in bad.items()]
    table += [{"file_name": "words.wav", "text": "the cat", "words": "nonsense"}, {"text": "no file"}]
    for name in ("silent.wav", "digits.wav", "words.wav"):
        (source / name).write_bytes((speech / "00.wav").read_bytes())
    table.append({"file_name": "silent.wav", "text": ""})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    command = ["align", str(source), str(tmp_path / "out"), "--aligner", str(aligner), "--workers", "1"]
    assert cli.main(command) == 2  # too many rejects: nothing is written
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    assert cli.main([*command, "--max-reject-ratio", "0.9"]) == 0
    found = rows(tmp_path / "out")
    assert [Path(row["file_name"]).name for row in found] == [f"{i:02d}.wav" for i in range(0, 20, 2)]
    assert found[0]["words"] == table[0]["words"]
    lines = (tmp_path / "out" / "aligned" / "rejects.jsonl").read_text().splitlines()
    reasons = {row["id"]: row["reason"] for row in map(json.loads, lines)}
    assert len(reasons) == len(table) - len(found)
    for name, (_, reason) in bad.items():
        assert reason in reasons[name]
    assert reasons["silent.wav"] == "no transcript"
    assert reasons[f"metadata.jsonl:{len(table) - 2}"] == "row without a path"
    assert "words are not" in reasons["words.wav"]


def test_mistakes_are_named(speech: Path, aligner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["align", str(speech), str(speech), "--aligner", str(aligner)], "whose metadata would be lost; give another folder"),
        (["align", str(speech), str(tmp_path / "out"), "--aligner", str(speech)], "give the folder of an aligner"),
        (["align", str(tmp_path / "no"), str(tmp_path / "out"), "--aligner", str(aligner)], "is not a folder of audio"),
        (["align", str(speech), str(tmp_path / "out"), "--aligner", str(aligner), "--max-seconds", "0"], "max_seconds=0"),
        (["train", "aligner"], "speech is not set"),
        (["train", "aligner", f"--speech={speech}", f"--run-dir={tmp_path / 'run'}", "--no-fit-window",
          "--model.max_frames=10", "--model.context_frames=1"], "longer than the window of 0.2 s; cut some"),
    ):  # fmt: skip
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_killed_run_goes_on_and_a_finished_one_is_skipped(
    speech: Path, aligner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its third task of five, and again between the shards and the metadata: the result is that of a whole run."""
    command = [str(speech), "--aligner", str(aligner), "--workers", "1", "--files-per-task", "4"]
    assert cli.main(["align", command[0], str(tmp_path / "whole"), *command[1:]]) == 0
    calls = []
    align_one = recipe.AlignTask._align

    def dying(task, item):
        calls.append(item["id"])
        if len(calls) == 10:
            raise KeyboardInterrupt
        return align_one(task, item)

    monkeypatch.setattr(recipe.AlignTask, "_align", dying)
    killed = ["align", command[0], str(tmp_path / "killed"), *command[1:]]
    assert cli.main(killed) == 130
    monkeypatch.setattr(recipe, "write_metadata", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(killed) == 130
    assert len(calls) == 22  # two of the task that was cut off were done once more
    monkeypatch.undo()
    assert cli.main(killed) == 0
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    capsys.readouterr()
    assert cli.main(killed) == 0
    assert "complete, skipped" in capsys.readouterr().out
    assert cli.main([*killed, "--max-seconds", "9"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_long_recordings_are_heard_in_pieces_by_any_network(
    speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a second and a Wav2Vec2: the words are those of the whole recording, and no more than a piece is read."""
    monkeypatch.setattr(recipe, "PIECE_S", 1.0)
    (tmp_path / "wav2vec2").mkdir()
    folder = wav2vec2_folder(tmp_path / "wav2vec2")
    assert cli.main(["align", str(speech), str(tmp_path / "out"), "--aligner", str(folder), "--workers", "1"]) == 0
    whole = load_aligner(folder)
    for utterance in read_utterances(tmp_path / "out"):
        assert isinstance(utterance, Utterance)
        times = [(w.start_s, w.end_s) for w in utterance.alignment]
        expected = [(w.start_s, w.end_s) for w in whole.align(utterance.audio, utterance.text)]
        np.testing.assert_allclose(times, expected, atol=2e-3)


def test_two_processes_train_the_aligner_that_one_trains(speech: Path, tmp_path: Path) -> None:
    """Two ranks take in one step what one takes in two batches; gradients are added, so the weights are the same."""
    common = ["train", "aligner", f"--speech={speech}", *TINY, "--batch_seconds=4", "--no-fit-window"]
    assert cli.main([*common, f"--run-dir={tmp_path / 'one'}", "--train.accumulate=2"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    module = ["-m", "speechquilt.cli", *common, f"--run-dir={tmp_path / 'two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *module], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=1e-3)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two")]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


STORY = [
    *(f"--aligner.{s.removeprefix('--')}" for s in TINY),
    *(f"--tokenizer.{s}" for s in ("model.width=32", "model.ffn_width=64", "model.codebook_size=16",
      "model.vq_warmup_updates=2", "train.steps=4", "train.warmup_steps=1", "train.num_threads=1")),
    *(f"--text_to_token.{s}" for s in ("llama.width=32", "llama.num_layers=1", "llama.ffn_width=64", "data.rows=2",
      "train.steps=3", "train.warmup_steps=1", "train.num_threads=1")),
    "--lm.train.steps=2", "--lm.train.warmup_steps=1", "--lm.pack.rows=2",
]  # fmt: skip


def test_a_story_with_align_goes_on_to_curriculum_patching(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recordings without word times carry a curriculum: a unit for each word, which only the aligner can have found."""
    command = ["story", "own", f"--speech={speech}", *STORY, "--lm.patcher.kind=curriculum"]
    assert cli.main([*command, f"--run-dir={tmp_path / 'with'}", "--align"]) == 0
    parallel = tmp_path / "with" / "shards" / "parallel"
    assert parallel.is_dir()
    found = json.loads((tmp_path / "with" / "results.json").read_text())
    assert found["aligner.aligned"] == 20
    assert found["lm.lm.speech_loss"] > 0
    speech_shards = ShardFolder(tmp_path / "with" / "shards" / "speech")
    ends = [
        int(segment.unit_end_T.sum())
        for document in map(speech_shards.__getitem__, range(len(speech_shards)))
        for segment in document.segments
    ]
    assert min(ends) > 1
    capsys.readouterr()
    assert cli.main([*command, f"--run-dir={tmp_path / 'with'}", "--align"]) == 0
    assert capsys.readouterr().out.count("complete, skipped") == 6


def test_a_story_whose_recordings_all_have_word_times_trains_no_aligner(
    speech: Path, aligner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed where the tokenizer would begin: the stage before it was not needed, on plain recordings it is."""
    assert cli.main(["align", str(speech), str(tmp_path / "out"), "--aligner", str(aligner), "--workers", "1"]) == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(own.train_tokenizer, "train_tokenizer", stop)
    for folder, trained in ((tmp_path / "out", False), (speech, True)):
        run = tmp_path / f"run-{trained}"
        assert cli.main(["story", "own", f"--speech={folder}", f"--run-dir={run}", "--align", *STORY]) == 130
        assert (run / "tokenizer").is_dir()
        assert (run / "aligner" / "words.jsonl").is_file() == trained


def test_the_output_is_a_folder_that_tokenize_reads_with_public_units(
    speech: Path, aligner: Path, tmp_path: Path
) -> None:
    """HuBERT units of the aligned folder: every recording has its tokens and its words, which is what parallel shards need."""
    assert cli.main(["align", str(speech), str(tmp_path / "out"), "--aligner", str(aligner), "--workers", "1"]) == 0
    tiny_tokenizers.hubert(tmp_path / "hubert")
    command = ["tokenize", str(tmp_path / "out"), str(tmp_path / "shards"), "--tokenizer", str(tmp_path / "hubert")]
    assert cli.main([*command, "--workers", "1"]) == 0
    parallel, tokenizer = SpokenFolder(tmp_path / "shards" / "parallel"), load(tmp_path / "hubert")
    by_id = {row["id"]: row for row in rows(tmp_path / "out")}
    assert len(parallel) == len(by_id) == 20
    for spoken_text in (parallel[i] for i in range(0, 20, 7)):
        row = by_id[spoken_text.id]
        assert list(spoken_text.words) == [word for word, _, _ in row["words"]]
        waveform = audio.resample(audio.load(tmp_path / "out" / row["file_name"]), tokenizer.sample_rate)
        ids_BT, _ = tokenizer.encode(
            torch.from_numpy(waveform.samples_S)[None], torch.tensor([len(waveform.samples_S)])
        )
        assert spoken_text.ids_T.tolist() == ids_BT[0].tolist()
