"""The aligner around the network: exact times from an emitter that hears perfectly, windows, rules for words."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.aligner import (
    BoundaryShift,
    CTCAligner,
    emissions,
    in_order,
    interpolated,
    num_interpolated,
    words_to_align,
)
from speechquilt.nn.ctc import Spelling
from speechquilt.types import AlignedWord, Waveform

LETTERS = "abcdefgh"
BLANK_ID = len(LETTERS)
CERTAIN = 0.9  # probability of what is heard


class PerfectEmitter:
    """Reads audio whose samples are letters: the level of a frame is the id. `reach` blurs over the frames around it."""

    sample_rate = 400
    blank = BLANK_ID

    def __init__(
        self, window_frames: int = 50, context_frames: int = 4, reach: int = 0, frame_samples: int = 8
    ) -> None:
        self.window_frames, self.context_frames, self.reach = window_frames, context_frames, reach
        self.frame_samples = frame_samples
        self.longest = 0

    def emit(self, wav_S: torch.Tensor) -> torch.Tensor:
        self.longest = max(self.longest, len(wav_S))
        padded_S = torch.nn.functional.pad(wav_S, (0, -len(wav_S) % self.frame_samples), value=BLANK_ID / 10)
        ids_F = (padded_S.view(-1, self.frame_samples)[:, 0] * 10).round().long()
        p_FV = torch.full((len(ids_F), BLANK_ID + 1), (1 - CERTAIN) / BLANK_ID)
        p_FV[torch.arange(len(ids_F)), ids_F] = CERTAIN
        if self.reach:
            p_1VF = torch.nn.functional.pad(p_FV.T[None], (self.reach, self.reach))
            p_FV = torch.nn.functional.avg_pool1d(p_1VF, 2 * self.reach + 1, 1)[0].T
        return p_FV.log()

    def spell(self, words: Sequence[str]) -> Spelling:
        known = [[LETTERS.index(c) for c in w] if set(w) <= set(LETTERS) else [] for w in words]
        word_L = np.repeat(np.arange(len(words)), [len(ids) for ids in known])
        return Spelling(ids_L=np.array([i for ids in known for i in ids], dtype=np.int64), word_L=word_L)


def spoken(rng: np.random.Generator, words: Sequence[str], emitter: PerfectEmitter) -> tuple[Waveform, np.ndarray]:
    """Audio of letters of 1 to 3 frames with a silent frame after each and pauses between words; true times `[W, 2]`."""
    ids = [BLANK_ID] * int(rng.integers(0, 4))
    times = []
    for word in words:
        first = len(ids)
        for letter in word:
            ids += [LETTERS.index(letter)] * int(rng.integers(1, 4)) + [BLANK_ID]
        times.append((first, len(ids) - 1))
        ids += [BLANK_ID] * int(rng.integers(0, 6))
    samples_S = np.repeat(np.array(ids, dtype=np.float32) / 10, emitter.frame_samples)
    return Waveform(samples_S=samples_S, sample_rate=emitter.sample_rate), np.array(times) * (
        emitter.frame_samples / emitter.sample_rate
    )


def times_of(words: Sequence[AlignedWord]) -> np.ndarray:
    return np.array([(w.start_s, w.end_s) for w in words])


WORDS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(words=WORDS, seed=st.integers(0, 99), window_frames=st.integers(3, 400), context_frames=st.integers(0, 30))
def test_perfect_hearing_gives_exact_times_through_any_windows(
    words: list[str], seed: int, window_frames: int, context_frames: int
) -> None:
    emitter = PerfectEmitter(window_frames, min(context_frames, (window_frames - 1) // 2))
    waveform, times_W2 = spoken(np.random.default_rng(seed), words, emitter)
    text = " ".join(word.capitalize() + "!" for word in words)
    found = CTCAligner(emitter).align(waveform, text)
    assert [w.text for w in found] == text.split()
    np.testing.assert_allclose(times_of(found), times_W2, atol=1e-9)
    assert all(w.score == pytest.approx(CERTAIN, abs=1e-5) for w in found)
    assert emitter.longest <= window_frames * emitter.frame_samples


@settings(max_examples=30, deadline=None)
@given(
    num_frames=st.integers(1, 200), reach=st.integers(0, 6), window_frames=st.integers(14, 60), seed=st.integers(0, 9)
)
def test_windows_join_without_a_seam(num_frames: int, reach: int, window_frames: int, seed: int) -> None:
    """Frames that hear their neighbours are the same as in one window, as long as the context covers the reach."""
    samples_S = np.random.default_rng(seed).integers(0, BLANK_ID + 1, num_frames).repeat(8)[: num_frames * 8 - 3] / 10
    columns_K = np.array([5, 0, BLANK_ID])
    windowed = PerfectEmitter(window_frames, context_frames=reach, reach=reach)
    whole = PerfectEmitter(window_frames=1000, reach=reach)
    samples_S = samples_S.astype(np.float32)
    cuts = np.sort(np.random.default_rng(seed + 1).integers(0, len(samples_S) + 1, 9))
    found_FK, num_samples = emissions(windowed, np.split(samples_S, cuts), columns_K)
    np.testing.assert_allclose(found_FK, emissions(whole, [samples_S], columns_K)[0], atol=1e-6)
    assert num_samples == len(samples_S)
    assert found_FK.shape == (num_frames, 3)


def test_a_context_that_is_too_short_shows() -> None:
    samples_S = (np.arange(100) % (BLANK_ID + 1)).repeat(8).astype(np.float32) / 10
    columns_K = np.arange(BLANK_ID + 1)
    deaf, _ = emissions(PerfectEmitter(20, context_frames=2, reach=4), [samples_S], columns_K)
    whole, _ = emissions(PerfectEmitter(1000, reach=4), [samples_S], columns_K)
    assert np.abs(deaf - whole).max() > 0.1


def test_an_hour_in_bounded_memory() -> None:
    """The network sees a window at a time; 45,000 frames and 18,000 letters; every word is found where it was put."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(LETTERS), 2)) for _ in range(6600)]
    emitter = PerfectEmitter(window_frames=375, context_frames=25, frame_samples=32)
    waveform, times_W2 = spoken(rng, words, emitter)
    assert waveform.duration_s > 3600
    found = CTCAligner(emitter).align(waveform, " ".join(words))
    np.testing.assert_allclose(times_of(found), times_W2, atol=1e-6)
    assert emitter.longest == 375 * 32


def test_a_word_that_cannot_be_spelled_lies_between_its_neighbours() -> None:
    emitter = PerfectEmitter()
    waveform, times_W2 = spoken(np.random.default_rng(1), ["abc", "de", "fed"], emitter)
    found = CTCAligner(emitter).align(waveform, "12 abc 1789 東京 de fed, 7")
    assert [w.text for w in found] == ["12", "abc", "1789", "東京", "de", "fed,", "7"]
    assert [w.score == 0 for w in found] == [True, False, True, True, False, False, True]
    assert num_interpolated(found) == 4
    np.testing.assert_allclose(times_of([found[1], found[4], found[5]]), times_W2)
    assert times_of(found)[0].tolist() == [0.0, found[1].start_s]
    assert (found[6].start_s, found[6].end_s) == (found[5].end_s, waveform.duration_s)
    cut_s = found[1].end_s + 4 / 6 * (found[4].start_s - found[1].end_s)  # four of six characters
    np.testing.assert_allclose(times_of(found)[2:4], [[found[1].end_s, cut_s], [cut_s, found[4].start_s]])


def test_a_shift_moves_boundaries_and_keeps_the_order() -> None:
    emitter = PerfectEmitter()
    waveform, times_W2 = spoken(np.random.default_rng(2), ["ab", "cd", "ef", "gh"], emitter)
    found_W2 = times_of(CTCAligner(emitter, BoundaryShift(start_s=-0.5, end_s=0.25)).align(waveform, "ab cd ef gh"))
    assert found_W2[0, 0] == 0.0
    assert found_W2[-1, 1] == waveform.duration_s
    assert (np.diff(found_W2.ravel()) >= 0).all()
    late = CTCAligner(emitter, BoundaryShift(end_s=0.001)).align(waveform, "ab cd ef gh")
    np.testing.assert_allclose(times_of(late)[:-1, 1], times_W2[:-1, 1] + 0.001)


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.floats(0, 10), min_size=1, max_size=8),
    lengths=st.lists(st.floats(0.01, 2), min_size=8, max_size=8),
    shifts=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_shifted_times_are_in_order_and_inside(
    starts: list[float], lengths: list[float], shifts: tuple[float, float]
) -> None:
    start_W = np.cumsum(starts)
    end_W = np.minimum(start_W + lengths[: len(starts)], np.append(start_W[1:], np.inf))
    duration_s = float(end_W[-1]) + 0.5
    times_W2 = in_order(np.stack([start_W, end_W], 1) + np.array(shifts), duration_s)
    assert times_W2.min() >= 0
    assert times_W2.max() <= duration_s
    assert (np.diff(times_W2.ravel()) >= 0).all()


def test_interpolation_leaves_known_words_alone() -> None:
    known_W2 = np.array([[np.nan, np.nan], [1.0, 2.0], [2.0, 3.0]])
    filled_W2 = interpolated(known_W2, np.array([1, 1, 1]), 4.0)
    assert filled_W2.tolist() == [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
    assert np.isnan(known_W2[0]).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat, sat.", ["a", "cat,", "sat."]),
        ("yes - no", ["yes -", "no"]),
        ("— “ so it is ”", ["— “ so", "it", "is ”"]),
        ("  twenty-five\n5% ", ["twenty-five", "5%"]),
        (" ... ", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert words_to_align(text) == words


@pytest.mark.parametrize(
    ("text", "num_frames", "message"),
    [
        ("12 34", 20, "'12 34' has no word in the emitter's alphabet; spell numbers out"),
        ("", 20, "has no word"),
        ("abcd aa", 6, "needs 7 frames, the audio of 0.12 s has 6"),
        ("ab", 0, "audio is empty"),
    ],
)
def test_what_cannot_be_aligned_is_named(text: str, num_frames: int, message: str) -> None:
    waveform = Waveform(samples_S=np.zeros(num_frames * 8, dtype=np.float32), sample_rate=400)
    with pytest.raises(ValueError, match=message):
        CTCAligner(PerfectEmitter()).align(waveform, text)
