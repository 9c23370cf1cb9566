"""Every command of README.md and of the how-to pages runs as it is written, on a small folder of one's own, sizes made tiny.

The folder holds what folders hold: broken audio, a missing transcript, stereo at 8 kHz, an empty text.
"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from speechquilt import audio, cli
from speechquilt.data.shards.documents import ShardFolder
from speechquilt.tts.espeak import EspeakTTSConfig
from tests.pages import ROOT, blocks, commands, how_to_pages

TINY_TOKENIZER = [
    "model.width=32",
    "model.ffn-width=64",
    "model.codebook-size=16",
    "model.vq-warmup-updates=2",
    "train.steps=4",
    "train.warmup-steps=1",
]
TINY_LLAMA = [
    "llama.width=32",
    "llama.num-layers=1",
    "llama.ffn-width=64",
    "data.rows=2",
    "train.steps=3",
    "train.warmup-steps=1",
]
TINY_ALIGNER = ["model.width=32", "model.num-layers=2", "train.steps=3", "train.warmup-steps=1"]
TINY_VOCODER = [
    "vocoder.width=16",
    "vocoder.ffn-width=24",
    "vocoder.num-layers=1",
    "crops.rows=2",
    "train.steps=2",
    "train.warmup-steps=1",
    "held-out-recordings=1",
]
TINY_DECODER = ["pieces.rows=2", "first=none", "train.steps=2", "train.warmup-steps=1", "phases.rounds=1"]
TINY_LM = ["pack.rows=2", "train.steps=2", "train.warmup-steps=1"]


def flags(settings: list[str], prefix: str = "") -> list[str]:
    return [f"--{prefix}{setting}" for setting in settings]


SETTINGS = {
    "train tokenizer": flags(TINY_TOKENIZER),
    "train aligner": flags(TINY_ALIGNER),
    "train text_to_token": flags(TINY_LLAMA),
    "train vocoder": flags(TINY_VOCODER),
    "train decoder": flags(TINY_DECODER),
    "train lm": flags(TINY_LM),
    "story own": [
        *flags(TINY_ALIGNER, "aligner."),
        *flags(TINY_TOKENIZER, "tokenizer."),
        *flags(TINY_LLAMA, "text-to-token."),
        *flags(TINY_LM, "lm."),
    ],
}


def page_commands() -> list[list[str]]:
    """README's, then those of the how-to pages in the order of the pipeline."""
    return [words for page in (ROOT / "README.md", *how_to_pages()) for words in commands(page.read_text())]


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("own")
    speech, text = root / "my" / "speech", root / "my" / "text"
    speech.mkdir(parents=True)
    text.mkdir()
    speaker = EspeakTTSConfig(voices=("en-us", "en+f4")).build()
    rows = []
    for i in range(12):
        spoken = speaker.speak(f"the red fox number {i} sees a small house today.", speaker.voices[i % 2])
        audio.save(speech / f"{i}.wav", spoken.audio)
        words = [[w.text, w.start_s, w.end_s] for w in spoken.alignment]
        rows.append({"file_name": f"{i}.wav", "text": spoken.text, "words": words})
    import soundfile

    stereo = np.stack([audio.resample(spoken.audio, 8000).samples_S] * 2, axis=1)
    soundfile.write(speech / "stereo.wav", stereo, 8000)
    (speech / "broken.wav").write_bytes(b"this is no audio")
    rows += [{"file_name": "stereo.wav", "text": "the same again"}, {"file_name": "broken.wav", "text": "nothing"}]
    (speech / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (text / "a.txt").write_text("The red fox sees a house. " * 12)
    (text / "b.md").write_text("東京 is far from here, but the fox walks on and on until it sees the small house. " * 3)
    item = {"prompt": {"text": "the red fox"}, "endings": [{"text": "sees"}, {"audio": "speech/0.wav"}], "answer": 0}
    (root / "my" / "items.jsonl").write_text(json.dumps(item) + "\n")
    return root


def test_help_lists_every_command(capsys):
    """With every recipe and study, in lines that can be copied."""
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text
        for inner in command if isinstance(command, dict) else ():
            assert cli.main([name, "--help"]) == 0
            assert f"speechquilt {name} {inner} " in capsys.readouterr().out


def test_no_words_say_what_to_do_first(capsys):
    assert cli.main([]) == 0
    assert "speechquilt story toy" in capsys.readouterr().out


def test_commands_of_the_pages_run(own_folder, monkeypatch, capsys):
    monkeypatch.chdir(own_folder)
    for command in page_commands():
        arguments = list(command)
        if arguments[:2] == ["story", "toy"]:  # .ci/run runs it whole
            continue
        arguments += SETTINGS.get(" ".join(arguments[:2]), [])
        assert cli.main(arguments) == 0, f"{shlex.join(command)}\n{capsys.readouterr().err}"
    speech = ShardFolder(Path("shards/speech"))
    assert len(speech) == 13  # broken.wav was counted, not lost
    assert sum(speech.manifest["rejects"].values()) == 1
    aligned = [json.loads(line) for line in Path("my/aligned/metadata.jsonl").read_text().splitlines()]
    assert [len(row["words"]) > 1 for row in aligned] == [True] * 13
    interleaved = ShardFolder(Path("shards/interleaved"))
    assert {s.modality for s in interleaved[0].segments} <= {"text", "speech"}
    found = json.loads(Path("runs/own/results.json").read_text())
    assert found["lm.lm.speech_loss"] > 0
    assert "accuracy" in json.loads(Path("runs/lm/items.json").read_text())
    (python,) = blocks((ROOT / "README.md").read_text(), ["python"])
    names: dict = {}
    exec(python, names)
    assert len(names["ids"]) > 0
    assert {s.modality for s in names["document"].segments} <= {"text", "speech"}
    assert all(score < 0 for score in names["scores"])


def test_the_python_door_opens_what_the_commands_made(own_folder, monkeypatch):
    """After the commands above: tokens of a file, a document of a text, and scores of endings in either modality."""
    import speechquilt as sq

    monkeypatch.chdir(own_folder)
    tokenizer, speaker = sq.load_tokenizer("runs/tokenizer"), sq.load_text_to_token("runs/text_to_token")
    ids_T = sq.tokenize(tokenizer, "my/speech/0.wav")
    assert 0 < len(ids_T) < 100
    document = sq.interleave(speaker, "the red fox sees a small house today and goes on. " * 4, seed=1)
    assert {segment.modality for segment in document.segments} <= {"text", "speech"}
    lm = sq.load_lm("runs/lm")
    scores = sq.score(lm, "the red fox", ["sees", ids_T])
    assert len(scores) == 2
    assert all(value < 0 for value in scores)
    assert sq.score(lm, ids_T, ["sees"]) != sq.score(lm, ids_T[:1], ["sees"])
    with pytest.raises(AttributeError, match="no attribute 'tokenise'"):
        sq.tokenise  # noqa: B018


def test_a_second_run_skips_what_is_complete(own_folder, monkeypatch, capsys):
    monkeypatch.chdir(own_folder)
    command = next(c for c in page_commands() if c[:2] == ["story", "own"])
    arguments = command + SETTINGS["story own"]
    assert cli.main(arguments) == 0
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("complete, skipped") == 5
    assert cli.main([*arguments, "--lm.train.lr=0.1"]) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tokenizer"], "speech is not set"),
        (["train", "tokenizer", "--speech=nowhere"], "nowhere is not a folder"),
        (["train", "tokenizer", "--spech=x"], "--speech"),
        (["train", "lm", "--train.steps=ten"], "--train.steps"),
        (["trian", "lm"], "did you mean train"),
        (["train", "ml"], "did you mean lm"),
        (["train", "lm", "--preset", "420"], "did you mean 420M"),
        (["train", "lm", "--config", "nowhere.json"], "nowhere.json is missing"),
        (["tokenize", "nowhere", "out", "--tokenizer", "nowhere"], "nowhere is not a folder"),
        (["inspect", "nowhere"], "nowhere is missing"),
        (["eval", "nowhere", "items.jsonl"], "nowhere"),
        (["interleave", "nowhere", "out", "--text-to-token", "x"], "nowhere does not exist"),
        (["story", "toy", "--scale=0"], "scale=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_run_folder_is_named(tmp_path, monkeypatch, capsys, own_folder):
    monkeypatch.chdir(own_folder)
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "tokenizer", "--speech=my/speech", f"--run-dir={tmp_path}/file/run"]) == 2
    assert "choose a writable folder" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "the seven stages" in text
    assert "speechquilt story toy" in text
