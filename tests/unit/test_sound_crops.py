"""Pieces of recordings: from everywhere, of one length, the same however they are asked for; what is broken is counted.

Planted and caught: no edges where a piece is resampled; draws from one generator for the whole batch, which ranks do not
share; a state that counts what the threads have read ahead.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import audio
from speechquilt.data.feed.sound_crops import CropLoader, CropsConfig
from speechquilt.data.sources.speech_corpora import INT16_SCALE, FolderCorpus, UtteranceList
from speechquilt.types import Utterance, Waveform

RATE = audio.SAMPLE_RATE


def counting(lengths: list[int]) -> UtteranceList:
    """Recordings whose samples count on from one to the next: a sample says where it comes from."""
    utterances, start = [], 1
    for number, length in enumerate(lengths):
        samples_S = np.arange(start, start + length, dtype=np.float32) / INT16_SCALE
        utterances.append(Utterance(id=str(number), text="x", audio=Waveform(samples_S=samples_S, sample_rate=RATE)))
        start += length
    return UtteranceList(utterances)


def plain(samples: int = 16, rows: int = 4, threads: int = 0) -> CropsConfig:
    return CropsConfig(samples=samples, rows=rows, gain_db=0.0, threads=threads)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=6), samples=st.integers(1, 60), seed=st.integers(0, 99)
)
def test_a_piece_is_a_run_of_one_recording_and_silence_behind_a_short_one(
    lengths: list[int], samples: int, seed: int
) -> None:
    loader = CropLoader(counting(lengths), plain(samples), RATE, seed=seed)
    ends = np.cumsum(lengths)
    for _ in range(3):
        batch = loader.next_batch()
        assert batch.wav_BS.shape == (4, samples)
        for piece_S in np.round(batch.wav_BS.numpy() * INT16_SCALE).astype(int):
            number = int(np.searchsorted(ends, piece_S[0] - 1, side="right"))
            count = min(samples, lengths[number])
            assert piece_S[:count].tolist() == list(range(piece_S[0], piece_S[0] + count))
            assert piece_S[count - 1] <= ends[number]
            assert not piece_S[count:].any()


def test_every_place_is_as_likely() -> None:
    """A recording of 3 s and one of 1 s; each quarter of what can begin a piece comes a quarter of the time."""
    loader = CropLoader(counting([24_000, 8_000]), plain(10, rows=2000), RATE)
    first_B = torch.round(loader.next_batch().wav_BS[:, 0] * INT16_SCALE).numpy()
    counts, _ = np.histogram(first_B, bins=[0, 8_000, 16_000, 24_000, 32_000])
    assert counts == pytest.approx(np.full(4, 500), abs=80)  # four standard deviations


@pytest.mark.parametrize(("rate", "wanted"), [(16_000, 22_050), (48_000, 22_050), (8_000, 16_000)])
def test_a_piece_has_the_sound_of_its_place_at_the_other_rate(tmp_path: Path, rate: int, wanted: int) -> None:
    """A tone cut out is that tone to its edges, as soxr makes it of the whole recording."""
    samples_S = 0.5 * np.sin(2 * np.pi * 440.0 * np.arange(2 * rate) / rate).astype(np.float32)
    audio.save(tmp_path / "a.wav", Waveform(samples_S=samples_S, sample_rate=rate))
    loader = CropLoader(FolderCorpus(tmp_path, need_text=False), plain(4000, rows=6), wanted)
    time_S = np.arange(4000) / wanted
    basis_S2 = np.stack([np.sin(2 * np.pi * 440.0 * time_S), np.cos(2 * np.pi * 440.0 * time_S)], 1)
    for piece_S in loader.next_batch().wav_BS.numpy():
        found, *_ = np.linalg.lstsq(basis_S2, piece_S, rcond=None)
        assert np.hypot(*found) == pytest.approx(0.5, rel=1e-3)
        assert np.abs(basis_S2 @ found - piece_S).max() < 2e-3


def test_ranks_threads_and_resumes_change_nothing() -> None:
    corpus, config = counting([500, 90, 300]), plain(rows=5)
    whole = CropLoader(corpus, config, RATE, seed=4)
    batches = [whole.next_batch() for _ in range(6)]
    assert [batch.number for batch in batches] == list(range(6))
    assert not torch.equal(batches[0].wav_BS, batches[1].wav_BS)
    for rank in (0, 1):
        loader = CropLoader(corpus, config, RATE, seed=4, rank=rank, world_size=2)
        assert all(torch.equal(loader.next_batch().wav_BS, batch.wav_BS[rank::2]) for batch in batches)
    threaded = CropLoader(corpus, plain(rows=5, threads=2), RATE, seed=4)
    assert all(torch.equal(threaded.next_batch().wav_BS, batch.wav_BS) for batch in batches[:3])
    state = json.loads(json.dumps(threaded.state_dict()))
    for again in (threaded, CropLoader(corpus, config, RATE, seed=4)):
        again.load_state_dict(state)
        assert all(torch.equal(again.next_batch().wav_BS, batch.wav_BS) for batch in batches[3:])
    threaded.close()
    with pytest.raises(ValueError, match="belongs to other recordings"):
        CropLoader(corpus, config, RATE, seed=5).load_state_dict(state)


@settings(max_examples=20, deadline=None)
@given(gain_db=st.floats(0.5, 20), peak=st.floats(0.01, 1.0))
def test_gain_is_within_its_bounds_and_full_scale(gain_db: float, peak: float) -> None:
    wave = Waveform(samples_S=np.full(4000, peak, np.float32), sample_rate=RATE)
    corpus = UtteranceList([Utterance(id="a", text="x", audio=wave)])
    loader = CropLoader(corpus, CropsConfig(samples=8, rows=64, gain_db=gain_db), RATE)
    level_B = loader.next_batch().wav_BS[:, 0]
    most = min(1.0, peak * 10 ** (gain_db / 20))
    assert float(level_B.max()) <= most * 1.01
    assert float(level_B.min()) >= peak * 10 ** (-gain_db / 20) * 0.99 - 1 / INT16_SCALE
    assert len(level_B.unique()) > 8


def folder(path: Path, good: int, broken: int) -> FolderCorpus:
    rows = []
    for number in range(good):
        audio.save(path / f"{number}.wav", Waveform(samples_S=np.full(800, 0.1, np.float32), sample_rate=8000))
        rows.append({"file_name": f"{number}.wav"})
    for number in range(broken):  # the table's duration spares the look into the header
        (path / f"b{number}.wav").write_bytes(b"this is no audio")
        rows.append({"file_name": f"b{number}.wav", "duration": 0.1})
    rows.append({"file_name": "missing.wav"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FolderCorpus(path, need_text=False)


def test_what_is_broken_is_counted_and_another_is_drawn(tmp_path: Path) -> None:
    loader = CropLoader(folder(tmp_path, good=12, broken=1), plain(rows=60), 8000)
    assert [reject.id for reject in loader.rejects] == ["missing.wav"]
    assert float(loader.next_batch().wav_BS.min()) > 0.09
    assert sorted(reject.id for reject in loader.rejects) == ["b0.wav", "missing.wav"]
    assert "1 x " in loader.reject_summary()


def test_too_much_that_is_broken_ends_the_run(tmp_path: Path) -> None:
    loader = CropLoader(folder(tmp_path, good=12, broken=4), plain(rows=60), 8000)
    with pytest.raises(ValueError, match=r"of 16 recordings cannot be decoded, more than 10%"):
        loader.next_batch()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    for wrong in ({"samples": 0}, {"rows": 0}, {"threads": -1}, {"gain_db": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CropsConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 for each of 5 ranks"):
        CropLoader(counting([50]), plain(), RATE, world_size=5)
    with pytest.raises(ValueError, match="none of 0 recordings"):
        CropLoader(counting([50]), plain(), RATE, numbers=[])


def test_only_the_recordings_that_are_named(tmp_path: Path) -> None:
    loader = CropLoader(counting([100, 100, 100]), plain(rows=40), RATE, numbers=[0, 2])
    first_B = torch.round(loader.next_batch().wav_BS[:, 0] * INT16_SCALE)
    assert ((first_B <= 100) | (first_B > 200)).all()
    assert len(loader) == 2
    assert loader.seconds == pytest.approx(200 / RATE)
