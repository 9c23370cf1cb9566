"""Our CTC Viterbi against the textbook lattice as a plain Python loop, same inputs, same run; then an hour of audio at once.

    python benchmarks/align.py [--seconds 10] [--batch 16] [--rounds 3] [--hour]

Both sides find paths of the same probability (checked here and in the tests). Inputs are random log-probabilities at 50
frames/s with 15 characters per second of text. Prints audio seconds aligned per CPU second, the ratio, and with --hour the
time and peak memory of one hour-long recording.
"""

import argparse
import resource
import statistics
import time

import numpy as np

from speechquilt.nn.ctc import ctc_viterbi

FRAMES_PER_S, CHARACTERS_PER_S, VOCAB_SIZE, BLANK_ID = 50, 15, 32, 0


def plain_viterbi(log_p_FV: list[list[float]], ids: list[int], blank: int) -> tuple[float, list[int]]:
    """Score and state of every frame over 2 L + 1 states, one number at a time, all ways in kept."""
    states = [blank]
    for i in ids:
        states += [i, blank]
    num_states = len(states)
    score = [float("-inf")] * num_states
    score[0] = log_p_FV[0][blank]
    score[1] = log_p_FV[0][states[1]]
    ways = []
    for log_p_V in log_p_FV[1:]:
        new, way = [], []
        for s in range(num_states):
            best, step = score[s], 0
            if s > 0 and score[s - 1] > best:
                best, step = score[s - 1], 1
            if s > 1 and states[s] != blank and states[s] != states[s - 2] and score[s - 2] > best:
                best, step = score[s - 2], 2
            new.append(best + log_p_V[states[s]])
            way.append(step)
        score = new
        ways.append(way)
    at = num_states - 1 if score[-1] >= score[-2] else num_states - 2
    best, path = score[at], [at]
    for way in reversed(ways):
        at -= way[at]
        path.append(at)
    return best, path[::-1]


def invented(rng: np.random.Generator, seconds: float, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random log-probabilities `[B, F, V]` float32 and texts `[B, L]`."""
    num_frames, num_ids = int(seconds * FRAMES_PER_S), int(seconds * CHARACTERS_PER_S)
    logits_BFV = rng.standard_normal((rows, num_frames, VOCAB_SIZE), dtype=np.float32) * 3
    log_p_BFV = logits_BFV - np.log(np.exp(logits_BFV).sum(2, keepdims=True))
    return log_p_BFV, rng.integers(1, VOCAB_SIZE, (rows, num_ids))


def aligned_seconds_per_s(log_p_BFV: np.ndarray, ids_BL: np.ndarray) -> tuple[float, np.ndarray]:
    rows, num_frames = log_p_BFV.shape[:2]
    started = time.process_time()
    paths = ctc_viterbi(log_p_BFV, np.full(rows, num_frames), ids_BL, np.full(rows, ids_BL.shape[1]), BLANK_ID)
    return rows * num_frames / FRAMES_PER_S / (time.process_time() - started), paths.score_B


def one_round(rng: np.random.Generator, seconds: float, batch: int) -> dict[str, float]:
    """Rates of one draw. The plain loop takes one row of the batch; a row costs it the same alone."""
    log_p_BFV, ids_BL = invented(rng, seconds, batch)
    log_p_FV, ids = log_p_BFV[0].tolist(), ids_BL[0].tolist()
    started = time.process_time()
    score, _ = plain_viterbi(log_p_FV, ids, BLANK_ID)
    plain = seconds / (time.process_time() - started)
    one, score_B = aligned_seconds_per_s(log_p_BFV[:1], ids_BL[:1])
    assert abs(score_B[0] - score) < 1e-6 * abs(score)
    many, score_B = aligned_seconds_per_s(log_p_BFV, ids_BL)
    assert abs(score_B[0] - score) < 1e-6 * abs(score)
    return {"plain loop": plain, "one recording": one, f"{batch} recordings": many}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each recording")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hour", action="store_true", help="then align one hour at once")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rounds = [one_round(rng, args.seconds, args.batch) for _ in range(args.rounds)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, rate in medians.items():
        print(
            f"{name:<14} {rate:>10,.0f} s of audio per CPU second, {rate / medians['plain loop']:.1f} x the plain loop"
        )
    if args.hour:
        log_p_BFV, ids_BL = invented(rng, 3600.0, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rate, _ = aligned_seconds_per_s(log_p_BFV, ids_BL)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"one hour       {3600 / rate:>10,.1f} CPU seconds, peak memory {peak / 1024:,.0f} MiB ({before / 1024:,.0f} before)"
        )


if __name__ == "__main__":
    main()
