"""What `align` writes comes back through the readers of a folder of speech; its aligner's window fits the recordings."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.shards.recordings import AlignedFolder, AlignedRecording, AlignedWriter, write_metadata
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.data.sources.speech_rows import list_audio
from speechquilt.data.sources.word_times import words_of
from speechquilt.stages.train_aligner import LONGEST_S, fitting_window, with_fitting_window
from speechquilt.tokenizer.emitters import FRAME_SAMPLES, CharacterCTCConfig
from speechquilt.types import AlignedWord, Utterance, Waveform

INFO = ShardInfo(num_text=0, num_speech=0, text_fingerprint="", speech_fingerprint="")
NAMES = st.text("ab é東", min_size=1, max_size=5).map(lambda name: name.strip() or "x")


@st.composite
def recordings(draw: st.DrawFn) -> list[AlignedRecording]:
    found = []
    for number in range(draw(st.integers(1, 5))):
        words = draw(st.lists(st.text("abc,'\"é東", min_size=1, max_size=4), min_size=1, max_size=6))
        cuts = sorted(draw(st.lists(st.floats(0, 5), min_size=2 * len(words), max_size=2 * len(words))))
        aligned = tuple(
            AlignedWord(text=word, start_s=a, end_s=b, score=draw(st.floats(0, 1)))
            for word, a, b in zip(words, cuts[::2], cuts[1::2])
        )
        path = "/".join([*draw(st.lists(NAMES, max_size=2)), f"{number}.wav"])
        recording = AlignedRecording(id=f"r{number}", path=path, text=" ".join(words), duration_s=5.0, words=aligned)
        found.append(recording)
    return found


@settings(max_examples=25, deadline=None)
@given(written=recordings(), output=st.sampled_from(["out", "corpus/out", "a/b/out"]))
def test_readers_find_the_audio_and_the_words_from_anywhere(written: list[AlignedRecording], output: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name) / "corpus", Path(name) / output
        root.mkdir()
        with AlignedWriter(folder / "aligned", INFO) as writer:
            for recording in written:
                writer.write(recording, recording.text)
        kept = AlignedFolder(folder / "aligned")
        write_metadata(folder, root, kept.in_order())
        items = list(list_audio(folder))
        assert [(item["id"], item["text"]) for item in items] == [(r.id, r.text) for r in written]
        for item, recording, row in zip(items, written, (kept[i] for i in range(len(kept)))):
            assert os.path.normpath(folder / item["path"]) == os.path.normpath(root / recording.path)
            assert [w.text for w in words_of(item)] == [w.text for w in recording.words]
            for found in (words_of(item), row.words):
                times = [(w.start_s, w.end_s) for w in found]
                np.testing.assert_allclose(times, [(w.start_s, w.end_s) for w in recording.words], atol=1e-4)
            assert [w.score for w in row.words] == pytest.approx([w.score for w in recording.words], abs=1e-4)


def test_the_audio_is_found_when_folders_are_links(tmp_path: Path) -> None:
    """Both are links to places at other depths; "a/../.." from a link does not lead where its name says."""
    (tmp_path / "disk/one/two/corpus").mkdir(parents=True)
    (tmp_path / "disk/out").mkdir()
    root, folder = tmp_path / "corpus", tmp_path / "out"
    root.symlink_to(tmp_path / "disk/one/two/corpus")
    folder.symlink_to(tmp_path / "disk/out")
    (root / "a.wav").write_bytes(b"found")
    write_metadata(folder, root, [AlignedRecording(id="a", path="a.wav", text="", duration_s=1.0, words=())])
    (item,) = list_audio(folder)
    assert (folder / item["path"]).read_bytes() == b"found"


def test_any_character_of_a_text_comes_back(tmp_path: Path) -> None:
    """Some end a line for `str.splitlines`, and none of them ends a line of JSONL."""
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\nend"
    samples_S = np.full(160, 0.1, np.float32)
    audio.save(tmp_path / "a.wav", Waveform(samples_S=samples_S, sample_rate=16000))
    write_metadata(tmp_path, tmp_path, [AlignedRecording(id="a", path="a.wav", text=text, duration_s=0.01, words=())])
    (item,), (utterance,) = list_audio(tmp_path), read_utterances(tmp_path)
    assert isinstance(utterance, Utterance)
    assert item["text"] == utterance.text == text


@given(seconds=st.lists(st.floats(0.01, 60), min_size=1, max_size=40))
def test_nine_in_ten_recordings_fit_the_window_unless_they_are_very_long(seconds: list[float]) -> None:
    config = with_fitting_window(CharacterCTCConfig(alphabet="a"), seconds)  # raises when the context does not fit
    window_s = config.max_frames * FRAME_SAMPLES / 16000
    assert window_s <= LONGEST_S
    short = sum(s <= window_s for s in seconds)
    assert short >= 0.9 * len(seconds) or window_s == LONGEST_S
    assert window_s <= max(seconds) + 0.02


def test_recordings_that_are_all_too_long_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    def utterance(seconds: float) -> Utterance:
        samples_S = np.zeros(round(seconds * 1000), dtype=np.float32)
        return Utterance(id="a", text="a", audio=Waveform(samples_S=samples_S, sample_rate=1000))

    short, long = utterance(1.0), utterance(3.0)
    assert [u is short for u in fitting_window([short, long], 2.0)] == [True]
    assert "1 recordings longer than the window of 2.0 s left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"all 2 recordings .* raise recipe\.model\.max_frames"):
        fitting_window([utterance(3.0), utterance(4.0)], 2.0)
