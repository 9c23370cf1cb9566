"""Readers of a user's folders: every broken item is a reject with its reason, and nothing else is lost."""

import json

import numpy as np
import pytest

from speechquilt import audio
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.stages.corpus import folder_corpus, join
from speechquilt.types import Reject, Utterance, Waveform


def tone(seconds: float = 0.3) -> Waveform:
    samples_S = 0.1 * np.sin(np.arange(int(16000 * seconds)) * 0.1).astype(np.float32)
    return Waveform(samples_S=samples_S, sample_rate=16000)


@pytest.fixture
def speech_folder(tmp_path):
    for name in ("a", "b", "c", "silent"):
        audio.save(tmp_path / f"{name}.wav", tone())
        (tmp_path / f"{name}.txt").write_text(f"this is {name}")
    (tmp_path / "silent.txt").write_text("  ")
    audio.save(tmp_path / "no_text.wav", tone())
    (tmp_path / "broken.wav").write_bytes(b"RIFF....")
    (tmp_path / "broken.txt").write_text("never heard")
    audio.save(tmp_path / "empty.wav", tone(0.0))
    (tmp_path / "empty.txt").write_text("nothing")
    return tmp_path


def test_pairs_of_files(speech_folder):
    read = list(read_utterances(speech_folder))
    assert [u.id for u in read if isinstance(u, Utterance)] == ["a.wav", "b.wav", "c.wav"]
    reasons = {r.id: r.reason for r in read if isinstance(r, Reject)}
    assert set(reasons) == {"silent.wav", "no_text.wav", "broken.wav", "empty.wav"}
    assert "no transcript" in reasons["no_text.wav"]
    assert "cannot be read as audio" in reasons["broken.wav"]
    assert "empty" in reasons["empty.wav"]


def test_without_need_of_text_a_recording_is_enough(speech_folder):
    ids = [u.id for u in read_utterances(speech_folder, need_text=False) if isinstance(u, Utterance)]
    assert "no_text.wav" in ids


@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_metadata_as_in_audiofolder(tmp_path, layout):
    audio.save(tmp_path / "x.wav", tone())
    if layout == "jsonl":
        row = {"file_name": "x.wav", "text": "hello you", "words": [["hello", 0.0, 0.1], ["you", 0.1, 0.3]]}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    else:
        (tmp_path / "metadata.csv").write_text("file_name,transcription\nx.wav,hello you\n")
    (utterance,) = read_utterances(tmp_path)
    assert utterance.text == "hello you"
    assert [w.text for w in utterance.alignment] == (["hello", "you"] if layout == "jsonl" else [])


def test_folders_that_hold_nothing_say_so(tmp_path):
    with pytest.raises(ValueError, match="holds no audio"):
        list(read_utterances(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        list(read_utterances(tmp_path / "nowhere"))


def test_too_many_rejects_stop_a_story(speech_folder):
    with pytest.raises(ValueError, match=r"4 of 7 items cannot be used, above max_reject_ratio=0\.1"):
        folder_corpus(speech_folder, None)
    corpus = folder_corpus(speech_folder, None, max_reject_ratio=0.9)
    assert len(corpus.sentences) + len(corpus.held_out) == 3
    assert {u.id for u in corpus.sentences}.isdisjoint(u.id for u in corpus.held_out)


def test_texts_of_a_story_stand_in_place_of_the_transcripts(speech_folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("plain  text\n")
    (tmp_path / "texts" / "b.jsonl").write_text('{"id": 7, "text": "seven"}\nnot json\n')
    corpus = folder_corpus(speech_folder, tmp_path / "texts", max_reject_ratio=0.9)
    assert {t.id: t.text for t in corpus.texts} == {"a.txt": "plain  text\n", "7": "seven"}  # byte for byte
    assert corpus.to_interleave == corpus.texts
    assert [r.reason for r in corpus.rejects][-1] == "not JSON"


def test_join_keeps_every_sentence_once_and_in_order():
    sentences = [f"s{i}." for i in range(100)]
    runs = join(sentences, 5, seed=0)
    assert " ".join(runs).split() == sentences
    assert {len(r.split()) for r in runs[:-1]} == {1, 2, 3, 4, 5}
    assert join(sentences, 5, seed=1) != runs
