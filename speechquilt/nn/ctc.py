"""CTC forced alignment: the most probable path of a known text through per-frame log-probabilities (spec 2, section 4).

It is written in numpy, because its operations on one frame's states start in a microsecond. Rows and states are
vectorised; the one Python loop is over frames.

Memory: the scores of all states at all frames would be terabytes for an hour of audio. Scores are therefore kept at
every `checkpoint_frames`-th frame only, and the way back is found piece by piece, from the scores at the start of each
piece. In n frames a path passes at most n ids, so a piece needs the states of n + 1 ids, however long the text. The
result is exact.

Axis letters: B rows, F frames, V ids, L ids of the text (targets), W ids in the window of a piece. Blank j stands
before target j, blank L after the last.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

BLANK = -1  # target number of a frame whose path is on a blank
SEPARATOR = -1  # word number of an id that stands between words
CHECKPOINT_FRAMES = 2048
# How the path came to a target. To a blank it came by staying or from the target before.
_STAY, _FROM_BLANK, _FROM_PREVIOUS = 0, 1, 2


@dataclass(frozen=True)
class Spelling:
    """A text as CTC targets: `ids_L` int64; `word_L` int64, the word each id belongs to, or SEPARATOR."""

    ids_L: np.ndarray
    word_L: np.ndarray


@dataclass(frozen=True)
class CTCPaths:
    """`target_BF` int64: number of the target at each frame, BLANK on a blank and beyond the row's frames; `score_B`
    float64: log-probability of each path. The frames where `target_BF == j` are one run, never empty: there target j is
    spoken."""

    target_BF: np.ndarray
    score_B: np.ndarray


@dataclass
class _Scores:
    """Best log-probability of a path to each state: `target_BL`, and `blank_BM` with M = L + 1.

    They are float64, because over an hour of frames the sums outgrow float32's digits.
    """

    target_BL: np.ndarray
    blank_BM: np.ndarray

    def window(self, low_B: np.ndarray, width: int) -> "_Scores":
        """States of the targets `low_B` to `low_B + width - 1` and the blanks around them."""
        columns_BM = low_B[:, None] + np.arange(width + 1)
        return _Scores(
            np.take_along_axis(self.target_BL, columns_BM[:, :-1], 1), np.take_along_axis(self.blank_BM, columns_BM, 1)
        )


def ctc_viterbi(
    log_p_BFV: np.ndarray,
    num_frames_B: np.ndarray,
    ids_BL: np.ndarray,
    num_ids_B: np.ndarray,
    blank: int,
    *,
    checkpoint_frames: int = CHECKPOINT_FRAMES,
) -> CTCPaths:
    """The best path of each row's ids through its frames; rows are right-padded, the padding is never read.

    Of equally good ways into a state the path takes staying, then coming from a blank. Raises ValueError when a row's
    ids need more frames than it has (equal neighbours need a blank between them), or when no path has a probability
    above 0.
    """
    num_frames_B, num_ids_B = np.asarray(num_frames_B), np.asarray(num_ids_B)
    inside_BL = np.arange(ids_BL.shape[1]) < num_ids_B[:, None]
    ids_BL = np.where(inside_BL, ids_BL, 0)
    _check(log_p_BFV, num_frames_B, ids_BL, num_ids_B, blank)
    problem = _Problem(log_p_BFV, num_frames_B, ids_BL, blank)
    num_rows, num_frames = log_p_BFV.shape[:2]
    starts = range(0, num_frames, checkpoint_frames)
    checkpoints = problem.checkpoints(starts)
    target_BF = np.full((num_rows, num_frames), BLANK, dtype=np.int64)
    score_B = np.zeros(num_rows)
    at_B, on_blank_B = num_ids_B.copy(), np.ones(num_rows, dtype=bool)
    for start in reversed(starts):
        stop = min(start + checkpoint_frames, num_frames)
        piece = _Piece(problem, checkpoints.pop(), at_B, start, stop)
        if stop == num_frames:
            score_B, at_B, on_blank_B = piece.best_ends(num_ids_B)
        at_B, on_blank_B = piece.trace(at_B, on_blank_B, target_BF[:, start:stop])
        del piece  # megabytes, before the next one is made
    if not np.isfinite(score_B).all():
        raise ValueError(
            f"row {int(np.argmin(np.isfinite(score_B)))}: no path has a finite probability; look for NaN or -inf in log_p_BFV"
        )
    target_BF[np.arange(num_frames) >= num_frames_B[:, None]] = BLANK
    return CTCPaths(target_BF, score_B)


def frames_needed(ids_L: np.ndarray) -> int:
    """The fewest frames a text fits into: one per id and one more between equal neighbours."""
    return len(ids_L) + int((ids_L[1:] == ids_L[:-1]).sum())


def target_frames(target_F: np.ndarray, num_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of each target of one path, int64 `[L]` each."""
    frame_N = np.flatnonzero(target_F != BLANK)
    targets_N = target_F[frame_N]
    order_L = np.arange(num_targets)
    return frame_N[np.searchsorted(targets_N, order_L)], frame_N[np.searchsorted(targets_N, order_L, "right") - 1]


def _check(
    log_p_BFV: np.ndarray, num_frames_B: np.ndarray, ids_BL: np.ndarray, num_ids_B: np.ndarray, blank: int
) -> None:
    num_rows, num_frames, vocab_size = log_p_BFV.shape
    if not (len(num_frames_B) == len(num_ids_B) == len(ids_BL) == num_rows):
        raise ValueError(f"log_p_BFV has {num_rows} rows; num_frames_B, ids_BL and num_ids_B must have as many")
    if (num_frames_B > num_frames).any() or (num_frames_B < 1).any():
        raise ValueError(f"num_frames_B={num_frames_B.tolist()} must lie in 1..{num_frames}, the frames of log_p_BFV")
    if not 0 <= blank < vocab_size or (ids_BL < 0).any() or (ids_BL >= vocab_size).any():
        raise ValueError(f"ids and blank={blank} must lie in 0..{vocab_size - 1}, the last axis of log_p_BFV")
    for row, (ids_L, n, frames) in enumerate(zip(ids_BL, num_ids_B.tolist(), num_frames_B.tolist())):
        if (ids_L[:n] == blank).any():
            raise ValueError(f"row {row}: the text holds the blank id {blank}; spell it without")
        needed = frames_needed(ids_L[:n])
        if needed > frames:
            raise ValueError(
                f"row {row}: a text of {n} ids needs at least {needed} frames, the audio has {frames}; "
                "leave it out, or check that text and audio belong together"
            )


class _Problem:
    """The inputs, and one frame's step through any window of the states."""

    def __init__(self, log_p_BFV: np.ndarray, num_frames_B: np.ndarray, ids_BL: np.ndarray, blank: int) -> None:
        self.log_p_BFV, self.num_frames_B, self.blank = log_p_BFV, num_frames_B, blank
        # Where each id stands in a frame's [B, V] laid flat: taking from a flat array is several times as fast.
        self.cell_BL = ids_BL + np.arange(len(ids_BL))[:, None] * log_p_BFV.shape[2]
        self.shortest = int(num_frames_B.min())
        # Cost of coming straight from the target before: 0, or forbidden where it is the same id (and at the first).
        self.skip_BL = np.full(ids_BL.shape, -np.inf)
        self.skip_BL[:, 1:][ids_BL[:, 1:] != ids_BL[:, :-1]] = 0.0

    def start(self) -> _Scores:
        """Before the first frame: on the blank in front of the text."""
        num_rows, num_ids = self.cell_BL.shape
        blank_BM = np.full((num_rows, num_ids + 1), -np.inf)
        blank_BM[:, 0] = 0.0
        return _Scores(np.full((num_rows, num_ids), -np.inf), blank_BM)

    def checkpoints(self, starts: range) -> list[_Scores]:
        """Scores of all states before each of these frames."""
        saved = [self.start()]
        for first, stop in pairwise(starts):
            scores = saved[-1]
            for frame in range(first, stop):
                scores = self.step(frame, scores, self.cell_BL, self.skip_BL)
            saved.append(scores)
        return saved

    def step(
        self,
        frame: int,
        before: _Scores,
        cell_BW: np.ndarray,
        skip_BW: np.ndarray,
        to_target_BW: np.ndarray | None = None,
        to_blank_BM: np.ndarray | None = None,
    ) -> _Scores:
        """Scores after `frame`; rows that have ended keep theirs.

        How each state was reached is written into `to_target_BW` and `to_blank_BM` when they are given.
        """
        from_blank_BW = before.blank_BM[:, :-1]
        from_previous_BW = skip_BW.copy()
        from_previous_BW[:, 1:] += before.target_BL[:, :-1]
        best_BW = np.maximum(before.target_BL, from_blank_BW)
        if to_target_BW is not None and to_blank_BM is not None:
            to_target_BW[:] = from_blank_BW > before.target_BL
            to_target_BW[from_previous_BW > best_BW] = _FROM_PREVIOUS
            to_blank_BM[:, 1:] = before.target_BL > before.blank_BM[:, 1:]
        np.maximum(best_BW, from_previous_BW, out=best_BW)
        blank_BM = before.blank_BM.copy()
        np.maximum(blank_BM[:, 1:], before.target_BL, out=blank_BM[:, 1:])
        log_p_BV = self.log_p_BFV[:, frame].astype(np.float64)
        best_BW += log_p_BV.ravel().take(cell_BW)
        blank_BM += log_p_BV[:, self.blank, None]
        if frame >= self.shortest:
            ended_B = self.num_frames_B <= frame
            best_BW[ended_B], blank_BM[ended_B] = before.target_BL[ended_B], before.blank_BM[ended_B]
            if to_target_BW is not None and to_blank_BM is not None:
                to_target_BW[ended_B], to_blank_BM[ended_B] = _STAY, False
        return _Scores(best_BW, blank_BM)


class _Piece:
    """The way back through frames `start` to `stop - 1`.

    `at_B`: the last target (or blank) that each row's path can have reached at the end of these frames.
    """

    def __init__(self, problem: _Problem, before: _Scores, at_B: np.ndarray, start: int, stop: int) -> None:
        num_ids, length = problem.cell_BL.shape[1], stop - start
        width = min(num_ids, length + 1)
        self.low_B = np.clip(at_B - length, 0, num_ids - width)
        self.rows_B = np.arange(len(at_B))
        columns_BW = self.low_B[:, None] + np.arange(width)
        cell_BW = np.take_along_axis(problem.cell_BL, columns_BW, 1)
        skip_BW = np.take_along_axis(problem.skip_BL, columns_BW, 1)
        skip_BW[:, :1] = -np.inf  # nothing enters a window from outside; no path of this piece could
        self.scores = before.window(self.low_B, width)
        self.to_target_FBW = np.zeros((length, len(at_B), width), dtype=np.uint8)
        self.to_blank_FBM = np.zeros((length, len(at_B), width + 1), dtype=bool)
        for i, frame in enumerate(range(start, stop)):
            ways = self.to_target_FBW[i], self.to_blank_FBM[i]
            self.scores = problem.step(frame, self.scores, cell_BW, skip_BW, *ways)

    def best_ends(self, num_ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score of each row's best path, where it ends, and whether that is a blank."""
        blank_B = self.scores.blank_BM[self.rows_B, num_ids_B - self.low_B]
        if not self.scores.target_BL.shape[1]:
            return blank_B, num_ids_B, np.ones(len(num_ids_B), dtype=bool)
        last_B = np.maximum(num_ids_B - 1, 0)
        target_B = np.where(num_ids_B > 0, self.scores.target_BL[self.rows_B, last_B - self.low_B], -np.inf)
        on_blank_B = ~(target_B > blank_B)
        return np.maximum(blank_B, target_B), np.where(on_blank_B, num_ids_B, last_B), on_blank_B

    def trace(self, at_B: np.ndarray, on_blank_B: np.ndarray, target_BF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write each frame's target into `target_BF`; returns where the paths are before the piece."""
        if not self.scores.target_BL.shape[1]:
            return at_B, on_blank_B
        for i in reversed(range(len(self.to_target_FBW))):
            target_BF[:, i] = np.where(on_blank_B, BLANK, at_B)
            column_B = at_B - self.low_B
            from_target_B = on_blank_B & self.to_blank_FBM[i, self.rows_B, column_B]
            way_B = self.to_target_FBW[i, self.rows_B, np.minimum(column_B, self.to_target_FBW.shape[2] - 1)]
            to_blank_B = ~on_blank_B & (way_B == _FROM_BLANK)
            to_previous_B = ~on_blank_B & (way_B == _FROM_PREVIOUS)
            at_B = at_B - (from_target_B | to_previous_B)
            on_blank_B = (on_blank_B & ~from_target_B) | to_blank_B
        return at_B, on_blank_B
