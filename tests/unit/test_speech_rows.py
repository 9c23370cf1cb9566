"""One reader of whatever holds speech: every row is there once with its own sound and words, or says why it is not."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.data.sources import audio_files
from speechquilt.data.sources.audio_files import End, read_whole
from speechquilt.data.sources.faults import BrokenAudio, BrokenText
from speechquilt.data.sources.folders import find, walk
from speechquilt.data.sources.speech_corpora import DatasetCorpus, FolderCorpus
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.data.sources.speech_rows import check_length, is_silent, list_audio, sound_of, text_of
from speechquilt.types import Reject, Utterance, Waveform
from tests.spoken_files import RATE, coded, dump, faults, good, heard, wave, write

# --- folders


def test_a_walk_is_ordered_and_ends(tmp_path: Path) -> None:
    for name in ("corpus/b/x.wav", "corpus/a/x.wav", "out/y.wav", "out/deep/z.wav"):
        write(tmp_path / name)
    corpus = tmp_path / "corpus"
    (corpus / "link").symlink_to("../out")
    (corpus / "again").symlink_to("../out/deep")
    (corpus / "inside").symlink_to("a")
    (corpus / "up").symlink_to("..")
    (tmp_path / "out" / "back").symlink_to("../corpus")
    found = [str((parent / name).relative_to(corpus)) for parent, names in walk(corpus) for name in names]
    assert found == ["a/x.wav", "again/z.wav", "b/x.wav", "link/y.wav"]


def test_names_are_found_however_they_are_composed(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301").mkdir()
    write(tmp_path / "cafe\u0301" / "u\u0308.wav")
    assert find(tmp_path, "caf\u00e9/\u00fc.wav") == tmp_path / "cafe\u0301" / "u\u0308.wav"
    assert find(tmp_path, "caf\u00e9/\u00fd.wav") is None
    assert find(tmp_path, str(tmp_path / "caf\u00e9/\u00fc.wav")) == tmp_path / "cafe\u0301" / "u\u0308.wav"


def test_librispeech_names_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path / "1" / "2" / "1-2-0000.flac")
    write(tmp_path / "1" / "2" / "1-2-0009.flac")
    (tmp_path / "1" / "2" / "1-2.trans.txt").write_text("1-2-0000 HELLO YOU\n1-2-0001 GONE\n")
    rows = list(list_audio(tmp_path))
    assert [(row["id"], row["text"]) for row in good(rows)] == [
        ("1/2/1-2-0000.flac", "HELLO YOU"),
        ("1/2/1-2-0009.flac", None),
    ]
    (missing,) = [row for row in rows if "reject" in row]
    assert (missing["reject"], "1-2.trans.txt line 2" in missing["detail"]) == ("missing file", True)


def test_an_audio_folder_is_no_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the extra `corpora` is not installed")
    write(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="is a folder of audio files, not a data set; give it as"):
        DatasetCorpus.load(str(tmp_path))


# --- inside other files


def tar(path: Path, members: list[tuple[str, bytes]], *, whole: bool = True) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


SAMPLES = [
    ("a/u0.flac", coded(seed=0)),
    ("a/u0.txt", b"the cat"),
    ("a/._u0.txt", b"\0\5\x16\7"),
    ("u1.json", b'{"text": "a dog", "id": "of the recording"}'),
    ("u1.wav", coded("WAV", seed=1)),
    ("u2.flac", coded(seed=2)),
    ("../u3.flac", coded(seed=3)),
    ("/etc/u4.flac", coded(seed=4)),
    ("u5.txt", b"no sound"),
    ("u6.flac", coded(seed=6)),
    ("u6.txt", b"\xff\xfe\xff"),
]


def test_webdataset(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", SAMPLES)
    for source in (tmp_path, tmp_path / "s.tar"):
        rows = list(list_audio(source))
        kept = good(rows)
        assert [row["id"] for row in kept] == ["s.tar/a/u0.flac", "s.tar/u1.wav", "s.tar/u2.flac", "s.tar/u6.flac"]
        assert [text_of(tmp_path, row) for row in kept[:3]] == ["the cat", "a dog", ""]
        with pytest.raises(BrokenText) as fault:
            text_of(tmp_path, kept[3])
        assert "u6.txt" in fault.value.detail
        for seed, row in zip((0, 1, 2, 6), kept):
            for form in (row, {k: v for k, v in row.items() if k != "at"}):  # a row of a table knows the name alone
                np.testing.assert_allclose(heard(tmp_path, form), wave(seed=seed), atol=1e-4)
        assert list(faults(rows).values()) == ["unsafe name in an archive"] * 2 + ["a sample without audio"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]  # nothing was unpacked


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 60_000))
def test_a_truncated_tar_gives_its_good_samples_and_says_so(tmp_path_factory, length: int) -> None:
    folder = tmp_path_factory.mktemp("tar")
    members = [(f"u{i}.wav", coded("WAV", seed=i)) for i in range(6)]
    tar(folder / "s.tar", members)
    data = (folder / "s.tar").read_bytes()
    ends = [512 * (i + 1) + sum(-(-len(d) // 512) * 512 for _, d in members[: i + 1]) for i in range(6)]
    (folder / "s.tar").write_bytes(data[:length])
    rows = list(list_audio(folder / "s.tar"))
    whole = [i for i, end in enumerate(ends) if end - 512 < length or end <= length]
    assert abs(len(good(rows)) - len(whole)) <= 1  # padding of the last member may be missing
    for row in good(rows):
        assert len(heard(folder, row)) == len(wave())
    assert (list(faults(rows).values()) == []) == (length >= ends[-1] + 512)


def test_a_packed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"unpack it to a \.tar"):
        list_audio(tmp_path / "s.tar.gz")


def test_parquet_with_audio_or_paths(tmp_path: Path) -> None:
    write(tmp_path / "p.wav", seed=2)
    cells = [
        {"bytes": coded(seed=0), "path": "u.flac"},
        {"bytes": coded(seed=1), "path": None},
        {"bytes": None, "path": "p.wav"},
    ]
    rows = [
        {"sound": cell, "sentence": f"text {i}"} for i, cell in enumerate([*cells, {"bytes": None, "path": None}, None])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    found = list(list_audio(tmp_path / "t.parquet"))
    assert [row["id"] for row in found] == ["u.flac", "t.parquet/1", "p.wav", "t.parquet/3", "t.parquet/4"]
    assert [row["text"] for row in found] == [f"text {i}" for i in range(5)]
    for seed, row in enumerate(found[:3]):
        np.testing.assert_allclose(heard(tmp_path, row), wave(seed=seed), atol=1e-4)
    for row in found[3:]:
        with pytest.raises(BrokenAudio, match="no audio in this row"):
            sound_of(tmp_path, row)
    with pytest.raises(BrokenAudio, match="missing file"):
        sound_of(tmp_path, {"id": "x", "path": "t.parquet/99"})


def test_shards_of_parquet_are_read_in_order(tmp_path: Path) -> None:
    for k in range(2):
        rows = [{"audio": {"bytes": coded(seed=i), "path": None}, "text": f"{k}{i}"} for i in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{k:05d}-of-00002.parquet")
    assert [row["text"] for row in list_audio(tmp_path)] == ["00", "01", "10", "11"]
    assert len(FolderCorpus(tmp_path)) == 4
    assert isinstance(FolderCorpus(tmp_path)[3], Utterance)


def cut_set(folder: Path) -> Any:
    lhotse = pytest.importorskip("lhotse", reason="the extra `corpora` is not installed")
    stereo = np.stack([wave(2.0, 1), wave(2.0, 2)], 1)
    soundfile.write(folder / "r.flac", stereo, RATE)
    recording = lhotse.Recording.from_file(folder / "r.flac")

    def cut(name: str, channel: int, start: float, duration: float) -> Any:
        said = lhotse.SupervisionSegment(name, recording.id, 0.0, duration, channel=channel, text=f"says {name}")
        return lhotse.MonoCut(name, start, duration, channel, supervisions=[said], recording=recording)

    part, other = cut("part", 0, 0.5, 1.0), cut("other", 1, 0.0, 2.0)
    cuts = [
        cut("whole", 0, 0.0, 2.0),
        part,
        other,
        part.resample(8000).with_id("slow"),
        part.pad(2.0).with_id("padded"),
    ]
    bad = cut("bad", 0, 0.0, 2.0).truncate(duration=1.0).with_id("bad")
    lhotse.CutSet.from_cuts([*cuts, bad]).to_file(folder / "cuts.jsonl.gz")


def test_cuts(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the extra `corpora` is not installed")
    cut_set(tmp_path)
    rows = list(list_audio(tmp_path / "cuts.jsonl.gz"))
    assert [row["id"] for row in rows] == ["whole", "part", "other", "slow", "padded", "bad"]
    assert faults(rows) == {"bad": "a supervision reaches out of its cut"}
    assert ["cut" in row for row in rows[:5]] == [False, False, True, True, True]
    assert [row["text"] for row in rows[:5]] == ["says whole", "says part", "says other", "says part", "says part"]
    left_S, right_S = wave(2.0, 1), wave(2.0, 2)
    found = [read_whole(sound_of(tmp_path, row)) for row in rows[:5]]
    for have, want in zip(found, (left_S, left_S[8000:24000], right_S)):
        np.testing.assert_allclose(have.samples_S, want, atol=1e-4)
    assert [(w.sample_rate, len(w.samples_S)) for w in found[3:]] == [(8000, 8000), (RATE, 2 * RATE)]
    json.dumps(rows)
    pieces = list(
        audio_files.read_pieces(sound_of(tmp_path, rows[3]), 0, rate=RATE, piece_samples=6000, max_seconds=9.0)
    )
    assert isinstance(pieces[-1], End)
    assert pieces[-1].duration_s == pytest.approx(1.0)


# --- sound


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 30_000), length=st.integers(1, 20_000), block=st.sampled_from([100, 4096, 1 << 17]))
def test_a_part_is_the_samples_of_the_whole(tmp_path_factory, kind: str, start: int, length: int, block: int) -> None:
    path = tmp_path_factory.mktemp("part") / "x"
    soundfile.write(path, wave(2.0), RATE, format=kind)
    whole_S = audio.load(path).samples_S
    row = {"id": "x", "path": "x", "start": start / RATE, "end": (start + length) / RATE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_files, "BLOCK_SAMPLES", block)
        np.testing.assert_allclose(heard(path.parent, row), whole_S[start : start + length], atol=1e-6)


def test_a_part_behind_the_end_says_so(tmp_path: Path) -> None:
    write(tmp_path / "x.wav", 1.0)
    with pytest.raises(BrokenAudio, match="a segment behind the end of its file"):
        heard(tmp_path, {"id": "x", "path": "x.wav", "start": 2.0, "end": 3.0})
    with pytest.raises(BrokenAudio, match="not as long as its table says"):
        check_length({"id": "x", "start": 0.2, "end": 3.0}, 0.8)


@settings(max_examples=30, deadline=None)
@given(
    silent=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    first_sound=st.none() | st.integers(0, 8999),
    block=st.sampled_from([64, 1000, 1 << 17]),
    rate=st.sampled_from([RATE, 22050]),
)
def test_the_first_channel_unless_all_of_it_is_zero(tmp_path_factory, silent, first_sound, block, rate) -> None:
    """`silent`: of each other channel 0 when it is; the first has one sample, or none, that is not."""
    samples_SC = np.stack(
        [np.zeros(9000), *(wave(0.5625, k) if loud else np.zeros(9000) for k, loud in enumerate(silent))], 1
    )
    if first_sound is not None:
        samples_SC[first_sound, 0] = 0.5
    path = tmp_path_factory.mktemp("channels") / "x.wav"
    soundfile.write(path, samples_SC, rate, subtype="FLOAT")
    channel = 0 if first_sound is not None or not any(silent) else 1 + next(k for k, loud in enumerate(silent) if loud)
    expected = Waveform(samples_S=samples_SC[:, channel].astype(np.float32), sample_rate=rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_files, "BLOCK_SAMPLES", block)
        *pieces, end = audio_files.read_pieces(path, 0, rate=RATE, piece_samples=4000, max_seconds=9.0)
    assert isinstance(end, End)
    assert (end.channel, end.is_silent) == (channel, not expected.samples_S.any())
    found_S = np.concatenate([piece.samples_S for piece in pieces])
    np.testing.assert_array_equal(found_S, audio.resample(expected, RATE).samples_S)
    np.testing.assert_array_equal(audio.load(path).samples_S, expected.samples_S)


# --- texts


@pytest.mark.parametrize(
    "text", ["...", "-- --", "[noise]", "[NOISE] <unk> ...", "nan", "NaN", "None", "(laughter)", "*coughs*", "♪♪"]
)
def test_what_says_nothing(tmp_path: Path, text: str) -> None:
    assert is_silent(text)
    write(tmp_path / "a.wav")
    dump(tmp_path, "metadata.jsonl", [{"file_name": "a.wav", "text": text}])
    (found,) = read_utterances(tmp_path)
    assert isinstance(found, Reject)
    assert (found.reason, found.detail.split(":")[0]) == ("no words in the transcript", "metadata.jsonl line 1")
    (spoken,) = read_utterances(tmp_path, need_text=False)
    assert isinstance(spoken, Utterance)
    assert spoken.text == ""
    assert isinstance(FolderCorpus(tmp_path).entry(0), Reject)


@pytest.mark.parametrize("text", ["no", "Nan went home", "[noise] hello", "(he said)", "5", "हिन्दी", "none", "नमस्ते"])
def test_what_says_something(text: str) -> None:
    assert not is_silent(text)


def test_texts_that_are_no_texts(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.wav")
    rows = [
        {"file_name": "a.wav", "text": ["a", "list"]},
        {"file_name": "b.wav", "text": "x\0y"},
        {"file_name": "c.wav", "text": 5},
    ]
    dump(tmp_path, "metadata.jsonl", rows)
    found = list(read_utterances(tmp_path))
    assert [getattr(x, "reason", "") for x in found] == ["the text is not a string", "NUL characters in the text", ""]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert {r.id: r.reason for r in read_utterances(tmp_path) if isinstance(r, Reject)}["a.wav"] == "not UTF-8"


@given(said=st.floats(0.1, 1000), heard_s=st.floats(0.1, 1000))
def test_the_tolerance_is_the_larger_of_half_a_second_and_five_percent(said: float, heard_s: float) -> None:
    fits = abs(said - heard_s) <= 0.5 or abs(said - heard_s) <= 0.05 * said
    try:
        check_length({"id": "x", "duration": said}, heard_s)
    except BrokenAudio:
        assert not fits
    else:
        assert fits


def test_a_name_that_is_no_utf8_is_no_id(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    os.rename(tmp_path / "a.wav", os.fsencode(tmp_path) + b"/\xe9.wav")
    (row,) = list_audio(tmp_path)
    assert (row["id"], row["reject"]) == ("?.wav", "the file name is not UTF-8")
    json.dumps(row, ensure_ascii=False).encode()
