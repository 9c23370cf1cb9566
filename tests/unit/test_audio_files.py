"""Audio as a stream: equal to reading it whole, bounded in memory, and no broken file is more than a reject."""

import itertools
import json
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.data.sources import audio_files
from speechquilt.data.sources.audio_files import End, Piece
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_rows import list_audio
from speechquilt.data.sources.word_times import words_of
from speechquilt.types import Waveform

RATES = [8000, 11025, 16000, 22050, 44100, 48000, 7919]


def wave(num_samples: int, rate: int, seed: int = 0) -> Waveform:
    rng = np.random.default_rng(seed)
    return Waveform(samples_S=(0.2 * rng.standard_normal(num_samples)).clip(-1, 1).astype(np.float32), sample_rate=rate)


def read(path: Path, piece_samples: int = 4000, max_seconds: float = float("inf")) -> tuple[list[Piece], End]:
    *pieces, end = audio_files.read_pieces(path, 3, rate=16000, piece_samples=piece_samples, max_seconds=max_seconds)
    assert all(isinstance(p, Piece) and p.file == 3 for p in pieces)
    assert isinstance(end, End)
    assert end.file == 3
    return pieces, end


@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(1, 30_000),
    rate=st.sampled_from(RATES),
    piece_samples=st.integers(1, 9000),
    block=st.integers(1, 5000),
    suffix=st.sampled_from([".wav", ".flac", ".ogg", ".aiff"]),
)
def test_pieces_together_are_the_whole_file(tmp_path_factory, num_samples, rate, piece_samples, block, suffix):
    path = tmp_path_factory.mktemp("audio") / f"x{suffix}"
    audio.save(path, wave(num_samples, rate))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio_files, "BLOCK_SAMPLES", block)
        pieces, end = read(path, piece_samples)
    whole_S = audio.resample(audio.load(path), 16000).samples_S
    assert [len(p.samples_S) for p in pieces[:-1]] == [piece_samples] * (len(pieces) - 1)
    assert bool(end.reject) == (len(whole_S) == 0)  # one sample at 48 kHz is none at 16 kHz
    if len(whole_S):
        np.testing.assert_array_equal(np.concatenate([p.samples_S for p in pieces]), whole_S)
        assert 0 < len(pieces[-1].samples_S) <= piece_samples
        assert end.duration_s == len(whole_S) / 16000


@given(
    num_samples=st.integers(0, 60),
    piece_samples=st.integers(1, 12),
    repeated=st.integers(0, 11),
    blocks=st.lists(st.integers(0, 60), max_size=8),
)
def test_pieces_that_overlap_hold_every_sample_and_its_past(num_samples, piece_samples, repeated, blocks):
    repeated = min(repeated, piece_samples - 1)
    whole_S = np.arange(num_samples, dtype=np.float32)
    cuts = sorted(min(b, num_samples) for b in blocks)
    pieces = list(audio_files.cut(np.split(whole_S, cuts), 7, piece_samples, repeated))
    assert [p.num_repeated for p in pieces] == [0, *[repeated] * (len(pieces) - 1)][: len(pieces)]
    assert all(p.file == 7 and len(p.samples_S) == piece_samples for p in pieces[:-1])
    assert all(len(p.samples_S) > p.num_repeated for p in pieces)
    np.testing.assert_array_equal(
        np.concatenate([whole_S[:0], *[p.samples_S[p.num_repeated :] for p in pieces]]), whole_S
    )
    for before, piece in itertools.pairwise(pieces):
        np.testing.assert_array_equal(piece.samples_S[:repeated], before.samples_S[piece_samples - repeated :])


def test_the_first_channel_is_taken(tmp_path):
    left, right = wave(5000, 16000, 1).samples_S, wave(5000, 16000, 2).samples_S
    soundfile.write(tmp_path / "x.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    pieces, _ = read(tmp_path / "x.wav", 10_000)
    np.testing.assert_array_equal(pieces[0].samples_S, left)


def test_memory_is_bounded_by_a_piece_and_a_block(tmp_path):
    audio.save(tmp_path / "x.wav", wave(48000 * 180, 48000))
    tracemalloc.start()
    try:
        for _ in audio_files.read_pieces(
            tmp_path / "x.wav", 0, rate=16000, piece_samples=32_000, max_seconds=float("inf")
        ):
            pass
        streamed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        audio.load(tmp_path / "x.wav")
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert whole > 30e6
    assert streamed < 4e6


def broken(folder: Path, kind: str) -> Path:
    path = folder / "x.wav"
    if kind == "text":
        path.write_bytes(b"this is no audio")
    elif kind == "no bytes":
        path.touch()
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16000)
    elif kind == "nan":
        soundfile.write(path, np.r_[np.zeros(9000), np.nan, np.zeros(9)].astype(np.float32), 16000, subtype="FLOAT")
    elif kind == "loud":
        soundfile.write(path, np.full(99, 1e30, dtype=np.float32), 16000, subtype="FLOAT")
    elif kind == "slow":
        soundfile.write(path, np.zeros(99), 7)
    elif kind == "long":
        soundfile.write(path, np.zeros(16000 * 3), 16000)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("text", "cannot be read as audio: Format not recognised."),
        ("no bytes", "cannot be read as audio"),
        ("no samples", "empty audio"),
        ("nan", "audio holds samples that are NaN or infinite"),
        ("loud", "audio holds samples beyond 64 times full scale"),
        ("slow", "its sample rate is outside 1000..768000 Hz"),
        ("long", "longer than 2 s"),
        ("missing", "missing file"),
    ],
)
def test_every_fault_has_its_reason_without_the_file_in_it(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    _, end = read(path, 4000, max_seconds=2.0)
    assert end.reject.startswith(reason)
    assert str(tmp_path) not in end.reject


SEEDS = {}


def valid_bytes(suffix: str) -> bytes:
    if suffix not in SEEDS:
        import io

        buffer = io.BytesIO()
        soundfile.write(buffer, wave(3000, 16000).samples_S, 16000, format=suffix[1:].upper())
        SEEDS[suffix] = buffer.getvalue()
    return SEEDS[suffix]


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from([".wav", ".flac", ".aiff", ".ogg"]),
    flips=st.lists(st.tuples(st.integers(0, 120), st.integers(1, 255)), max_size=6),
    cut=st.none() | st.integers(0, 4000),
)
@example(suffix=".wav", flips=[(20, 2)], cut=None)  # PCM read as float
@example(suffix=".wav", flips=[(22, 0xFF), (23, 0xFF)], cut=None)  # 65,000 channels
@example(suffix=".wav", flips=[(27, 0x7F)], cut=None)  # two gigahertz
def test_a_damaged_file_is_decoded_or_rejected(tmp_path_factory, suffix, flips, cut):
    data = bytearray(valid_bytes(suffix))
    for place, change in flips:
        data[place % len(data)] ^= change
    path = tmp_path_factory.mktemp("fuzz") / f"x{suffix}"
    path.write_bytes(data[:cut])
    pieces, end = read(path, 4000, max_seconds=60.0)
    if end.reject:
        assert str(path) not in end.reject
    else:
        assert sum(len(p.samples_S) for p in pieces) == round(end.duration_s * 16000) > 0
        assert all(np.isfinite(p.samples_S).all() for p in pieces)


def test_a_folder_is_searched_in_a_fixed_order(tmp_path):
    for name in ("b.wav", "a.FLAC", "sub/c.mp3", "sub/a.opus", "aa/x.wav", "notes.txt", "a.json", "x.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items = list(list_audio(tmp_path))
    assert [i["id"] for i in items] == ["a.FLAC", "b.wav", "aa/x.wav", "sub/a.opus", "sub/c.mp3"]
    assert items[0] == {"id": "a.FLAC", "path": "a.FLAC", "text": None, "words": None}


WORDS = [["hello", 0.0, 0.1], ["you", 0.1, 0.3]]


@pytest.mark.parametrize("layout", ["metadata.jsonl", "metadata.csv", "table.jsonl", "table.parquet"])
def test_tables_in_every_layout(tmp_path, layout):
    path = tmp_path / layout
    key = "file_name" if layout.startswith("metadata") else "path"
    if layout.endswith(".jsonl"):
        rows = [
            json.dumps({key: "x.wav", "text": " hello you ", "words": WORDS}),
            "not json",
            '{"text": "no file"}',
            "",
        ]
        path.write_text("\n".join(rows))
    elif layout.endswith(".csv"):
        path.write_text(f"{key},transcription\nx.wav,hello you\n,no file\n")
    else:
        words = [{"text": w, "start_s": a, "end_s": b} for w, a, b in WORDS]
        pq.write_table(pa.table({"path": ["x.wav", None], "text": ["hello you", "a"], "words": [words, None]}), path)
    first, *rest = list_audio(tmp_path if layout.startswith("metadata") else path)
    assert (first["id"], first["path"], first["text"]) == ("x.wav", "x.wav", "hello you")
    words = words_of(first)
    assert [(w.text, w.start_s, w.end_s) for w in words] == ([] if "csv" in layout else [tuple(w) for w in WORDS])
    not_json = {"not JSON"} if layout.endswith(".jsonl") else set()
    assert {r["reject"] for r in rest} == {"row without a path"} | not_json
    assert all(r["detail"].startswith(layout) for r in rest)
    json.dumps([first, *rest])  # plain data


def test_what_is_no_corpus_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no audio"):
        list(list_audio(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        list_audio(tmp_path / "nowhere")
    with pytest.raises(BrokenAudio, match="words are not"):
        words_of({"words": [["a", 0.0]]})


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(0, 12), max_size=12), threads=st.integers(1, 4))
def test_reading_ahead_keeps_the_order(counts, threads):
    def pieces_of(source):
        number, count = source
        yield from (Piece(file=number, samples_S=np.array([i])) for i in range(count))
        yield End(file=number)

    events = audio_files.read_ahead(list(enumerate(counts)), pieces_of, threads=threads)
    got = [(e.file, int(e.samples_S[0]) if isinstance(e, Piece) else "end") for e in events]
    assert got == [(n, x) for n, count in enumerate(counts) for x in [*range(count), "end"]]


def test_reading_ahead_is_bounded_and_stops_when_left():
    made = []

    def endless(source):
        for i in range(10_000):
            made.append(source)
            yield Piece(file=source, samples_S=np.array([i]))

    before = threading.active_count()
    events = audio_files.read_ahead(list(range(50)), endless, threads=2)
    for _ in range(20):
        next(events)
    time.sleep(0.2)
    assert len(made) <= 20 + 2 * (audio_files.AHEAD + 2)
    assert set(made) == {0, 1}
    events.close()
    assert threading.active_count() == before


def test_an_error_in_a_reading_thread_is_raised():
    def bug(source):
        yield Piece(file=source, samples_S=np.zeros(1))
        raise RuntimeError("a bug, no broken file")

    with pytest.raises(RuntimeError, match="a bug"):
        list(audio_files.read_ahead([0, 1], bug, threads=2))
    with pytest.raises(ZeroDivisionError):
        list(audio_files.prefetch((1 // (2 - i) for i in range(5)), ahead=1))
