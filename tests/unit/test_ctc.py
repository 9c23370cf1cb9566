"""The Viterbi of CTC: the best path of all, whatever the padding, the batch and the checkpoints."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.nn.ctc import BLANK, ctc_viterbi, frames_needed, target_frames


def every_path(log_p_FV: np.ndarray, ids: list[int], blank: int) -> dict[tuple[int, ...], float]:
    """Score of every path that spells the text: all V^F of them tried."""
    num_frames, vocab_size = log_p_FV.shape
    return {
        path: float(sum(log_p_FV[f, v] for f, v in enumerate(path)))
        for path in itertools.product(range(vocab_size), repeat=num_frames)
        if [v for v, _ in itertools.groupby(path) if v != blank] == ids
    }


def plain_viterbi(log_p_FV: np.ndarray, ids: list[int], blank: int) -> float:
    """Score of the best path by the textbook lattice of 2 L + 1 states, one number at a time."""
    states = [blank]
    for i in ids:
        states += [i, blank]
    score = [-np.inf] * len(states)
    for f, log_p_V in enumerate(log_p_FV.tolist()):
        new = []
        for s, v in enumerate(states):
            ways = [score[s], score[s - 1] if s else -np.inf]
            if s > 1 and v not in (blank, states[s - 2]):
                ways.append(score[s - 2])
            new.append((max(ways) if f else (0.0 if s < 2 else -np.inf)) + log_p_V[v])
        score = new
    return max(score[-2:])


def random_log_p(rng: np.random.Generator, num_frames: int, vocab_size: int) -> np.ndarray:
    return np.log(rng.dirichlet(np.full(vocab_size, 0.5), num_frames) + 1e-6).astype(np.float32)


def align_one(log_p_FV: np.ndarray, ids: list[int], blank: int, **keys: int) -> tuple[np.ndarray, float]:
    ids_BL = np.array([ids], dtype=np.int64).reshape(1, -1)
    paths = ctc_viterbi(log_p_FV[None], np.array([len(log_p_FV)]), ids_BL, np.array([len(ids)]), blank, **keys)
    return paths.target_BF[0], float(paths.score_B[0])


def spoken(target_F: np.ndarray, ids: list[int], blank: int) -> tuple[int, ...]:
    return tuple(blank if j == BLANK else ids[j] for j in target_F)


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[np.ndarray, list[int], int, int]:
    """Up to 6 frames of up to 3 ids, repeats and empty texts included; how often scores are kept."""
    vocab_size, num_frames = draw(st.integers(2, 3)), draw(st.integers(1, 6))
    blank = draw(st.integers(0, vocab_size - 1))
    letters = [v for v in range(vocab_size) if v != blank]
    ids = draw(st.lists(st.sampled_from(letters), max_size=num_frames))
    while frames_needed(np.array(ids)) > num_frames:
        ids = ids[:-1]
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    return random_log_p(rng, num_frames, vocab_size), ids, blank, draw(st.integers(1, 7))


@settings(max_examples=80, deadline=None)
@given(case=small_cases())
def test_the_path_is_the_best_of_all_paths(case: tuple[np.ndarray, list[int], int, int]) -> None:
    log_p_FV, ids, blank, checkpoint_frames = case
    scores = every_path(log_p_FV, ids, blank)
    target_F, score = align_one(log_p_FV, ids, blank, checkpoint_frames=checkpoint_frames)
    path = spoken(target_F, ids, blank)
    assert path in scores  # it spells the text
    assert score == pytest.approx(max(scores.values()), abs=1e-4)
    assert scores[path] == pytest.approx(score, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_frames=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    checkpoint_frames=st.integers(1, 70),
)
def test_a_row_in_a_batch_is_the_row_alone_by_the_plain_lattice(
    seed: int, num_frames: list[int], checkpoint_frames: int
) -> None:
    """Rows of different lengths; garbage in the padding; pieces of any length."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 5, rng.integers(0, n // 2 + 1)).tolist() for n in num_frames]
    log_p_BFV = rng.normal(size=(len(texts), max(num_frames), 5)).astype(np.float32) * 50
    ids_BL = np.full((len(texts), max(map(len, texts))), -100)
    for b, (ids, n) in enumerate(zip(texts, num_frames)):
        log_p_BFV[b, :n] = random_log_p(rng, n, 5)
        ids_BL[b, : len(ids)] = ids
    paths = ctc_viterbi(
        log_p_BFV,
        np.array(num_frames),
        ids_BL,
        np.array([len(ids) for ids in texts]),
        0,
        checkpoint_frames=checkpoint_frames,
    )
    for b, (ids, n) in enumerate(zip(texts, num_frames)):
        alone_F, score = align_one(log_p_BFV[b, :n], ids, 0)
        assert paths.score_B[b] == pytest.approx(plain_viterbi(log_p_BFV[b, :n], ids, 0), abs=1e-3)
        assert paths.score_B[b] == pytest.approx(score)
        np.testing.assert_array_equal(paths.target_BF[b, :n], alone_F)
        assert (paths.target_BF[b, n:] == BLANK).all()


def test_a_path_without_slack_takes_every_frame() -> None:
    """As many frames as the text needs: one path exists, even through frames that speak against it."""
    ids = [1, 1, 2, 2, 2, 1]
    log_p_FV = random_log_p(np.random.default_rng(0), frames_needed(np.array(ids)), 3)
    target_F, _ = align_one(log_p_FV, ids, 0, checkpoint_frames=2)
    assert target_F.tolist() == [0, BLANK, 1, 2, BLANK, 3, BLANK, 4, 5]


def test_frames_of_targets() -> None:
    first_L, last_L = target_frames(np.array([BLANK, 0, 0, 1, BLANK, BLANK, 2]), 3)
    assert first_L.tolist() == [1, 3, 6]
    assert last_L.tolist() == [2, 3, 6]


def test_an_empty_text_is_blanks() -> None:
    log_p_FV = random_log_p(np.random.default_rng(0), 5, 3)
    target_F, score = align_one(log_p_FV, [], 2)
    assert (target_F == BLANK).all()
    assert score == pytest.approx(float(log_p_FV[:, 2].sum()))


@pytest.mark.parametrize(
    ("ids", "blank", "message"),
    [
        ([1, 1, 1], 0, "3 ids needs at least 5 frames, the audio has 4"),
        ([1, 2, 1, 2, 1], 0, "5 ids needs at least 5 frames"),
        ([0], 0, "holds the blank id 0"),
        ([3], 0, r"must lie in 0\.\.2"),
        ([1], 3, r"blank=3 must lie in 0\.\.2"),
    ],
)
def test_what_cannot_be_aligned_is_named(ids: list[int], blank: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_one(random_log_p(np.random.default_rng(0), 4, 3), ids, blank)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_frame_without_probabilities_is_named(bad: float) -> None:
    log_p_FV = random_log_p(np.random.default_rng(0), 4, 3)
    log_p_FV[2] = bad
    with pytest.raises(ValueError, match="no path has a finite probability"):
        align_one(log_p_FV, [1, 2], 0)


def test_memory_grows_with_frames_or_ids_but_not_with_both() -> None:
    """Four minutes at 50 Hz: every way into every state would be 12,000 x 2,400 x 2 bytes = 58 MB."""
    rng = np.random.default_rng(0)
    log_p_FV, ids = random_log_p(rng, 12_000, 8), rng.integers(1, 8, 2_400).tolist()
    tracemalloc.start()
    target_F, _ = align_one(log_p_FV, ids, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    np.testing.assert_array_equal(np.unique(target_F), np.arange(-1, 2_400))
