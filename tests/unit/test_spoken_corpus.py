"""A spoken corpus: sets that share no sentence and no unseen voice, and the same bytes however often it was killed."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.stages import spoken_corpus
from speechquilt.stages.spoken_corpus import (
    HELD_OUT,
    METADATA,
    STATE,
    TRAIN,
    UNSEEN_VOICE,
    SpokenCorpusConfig,
    speak_corpus,
    split,
)
from speechquilt.text import spoken_form
from speechquilt.tts.voices import VoiceBank, VoiceName

SETTINGS = SpokenCorpusConfig(
    voices=("espeak:en-us", "espeak:en+m3", "espeak:en+f4+p1.10r1.30"),
    unseen_voice="espeak:en-gb-scotland",
    held_out=3,
    minutes=5.0,
)
SENTENCES = [f"The {what} is {where}." for what in ("cat", "red boat", "egg") for where in ("here", "on a hill", "old")]
SAME = ["the cat is... HERE", "The cat's old."]  # the first says what one of them says


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken_corpus, "SENTENCES_PER_TASK", 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoken") / "corpus"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(spoken_corpus, "SENTENCES_PER_TASK", 2)
        found = speak_corpus(SENTENCES + SAME, folder, SETTINGS, workers=1)
    assert found["corpus.train.recordings"] == 14
    assert found["corpus.held_out.recordings"] == 3
    assert found["corpus.unseen_voice.recordings"] == 3
    assert found["corpus.rejects"] == 0
    return folder


def rows(corpus: Path, name: str) -> list[dict]:
    return [json.loads(line) for table in sorted((corpus / name).glob(f"*/{METADATA}")) for line in table.open()]


def digests(corpus: Path) -> dict[str, str]:
    files = (path for path in sorted(corpus.rglob("*")) if path.is_file() and path.name != STATE)
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_no_sentence_and_no_unseen_voice_is_trained_on(corpus: Path) -> None:
    said = {name: {spoken_form(row["text"]) for row in rows(corpus, name)} for name in (TRAIN, HELD_OUT, UNSEEN_VOICE)}
    assert said[HELD_OUT] == said[UNSEEN_VOICE]
    assert len(said[HELD_OUT]) == 3
    assert not said[TRAIN] & said[HELD_OUT]
    assert len(said[TRAIN] | said[HELD_OUT]) == len(SENTENCES) + 1
    speakers = {VoiceName.parse(row["voice"]).speaker for row in rows(corpus, TRAIN) + rows(corpus, HELD_OUT)}
    assert {row["voice"] for row in rows(corpus, UNSEEN_VOICE)} == {"espeak:en-gb-scotland"}
    assert "espeak:en-gb-scotland" not in speakers


def test_every_pass_is_spoken_by_another_voice_at_another_speed(corpus: Path) -> None:
    voices: dict[str, set[str]] = {}
    for row in rows(corpus, TRAIN):
        voices.setdefault(row["text"], set()).add(row["voice"])
        assert 0.9 <= row["speed"] <= 1.1
    assert all(len(by) == 2 for by in voices.values())
    assert {voice for by in voices.values() for voice in by} == set(SETTINGS.voices)
    assert {row["speed"] for row in rows(corpus, HELD_OUT)} == {1.0}


def test_the_readers_of_speech_take_it(corpus: Path) -> None:
    for name, number in ((TRAIN, 14), (HELD_OUT, 3)):
        read = FolderCorpus(corpus / name)
        assert len(read) == number
        for i in range(number):
            utterance = read[i]
            assert utterance.audio.sample_rate == 16_000
            assert " ".join(w.text for w in utterance.alignment) == utterance.text == read.entry(i).text
            assert (
                utterance.alignment[-1].end_s
                <= utterance.duration_s
                == pytest.approx(read.entry(i).duration_s, abs=1e-3)
            )


def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken, speak = 0, VoiceBank.speak

    def dying(bank: VoiceBank, text: str, voice: str):
        nonlocal spoken
        spoken += 1
        if spoken % 7 == 0:
            raise KeyboardInterrupt
        return speak(bank, text, voice)

    monkeypatch.setattr(VoiceBank, "speak", dying)
    for _ in range(10):
        try:
            speak_corpus(SENTENCES + SAME, tmp_path, SETTINGS, workers=1)
            break
        except KeyboardInterrupt:
            assert (tmp_path / spoken_corpus.UNFINISHED).is_dir()
    assert spoken > 20  # it did die, and what was unfinished was spoken again
    assert digests(tmp_path) == digests(corpus)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for workers in (1, 2):
        speak_corpus(SENTENCES * 30, tmp_path / str(workers), replace(SETTINGS, passes=3), workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def test_when_the_time_is_over_only_held_out_sentences_are_still_spoken(corpus: Path, tmp_path: Path) -> None:
    short = replace(SETTINGS, minutes=1e-6)
    found = speak_corpus(SENTENCES + SAME, tmp_path, short, workers=1)
    assert found["corpus.held_out.recordings"] == found["corpus.unseen_voice.recordings"] == 3
    assert found["corpus.train.recordings"] == 0
    speak_corpus(SENTENCES + SAME, tmp_path, SETTINGS, workers=1)  # more time
    assert digests(tmp_path) == digests(corpus)


def test_what_a_voice_cannot_speak_is_kept_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speak = VoiceBank.speak

    def picky(bank: VoiceBank, text: str, voice: str):
        if "egg" in text:
            raise ValueError("it does not say egg")
        return speak(bank, text, voice)

    monkeypatch.setattr(VoiceBank, "speak", picky)
    found = speak_corpus(SENTENCES, tmp_path, replace(SETTINGS, passes=1), workers=1)
    left_out = [json.loads(line) for path in tmp_path.rglob("rejects.jsonl") for line in path.open()]
    assert found["corpus.rejects"] == len(left_out) >= 3
    assert {row["detail"] for row in left_out} == {"it does not say egg"}


def test_other_settings_or_sentences_need_another_folder(corpus: Path) -> None:
    with pytest.raises(ValueError, match="begun with other settings"):
        speak_corpus(SENTENCES + SAME, corpus, replace(SETTINGS, seed=1), workers=1)
    with pytest.raises(ValueError, match="begun with other settings"):
        speak_corpus(SENTENCES, corpus, SETTINGS, workers=1)
    with pytest.raises(ValueError, match="too few for held_out=3"):
        split(SENTENCES[:3], SETTINGS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("voices", ("espeak:en-gb-scotland+p1.10r1.00", "espeak:en")),
        ("held_out", 0),
        ("sentences", -1),
        ("passes", 4),
        ("minutes", 0.0),
        ("speed_spread", 0.5),
    ],
)
def test_wrong_settings_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        replace(SETTINGS, **{key: value})  # type: ignore[arg-type]
