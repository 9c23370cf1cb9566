"""How long one block of a streaming tokenizer takes to compute, beside the audio that it lasts, and against offline in the same run.

    python benchmarks/streaming.py [--preset toy|tiny|...|large-v3] [--context-s 0 10] [--seconds 60] [--rounds 3] [--device cpu]

Random weights, which cost the same; only the part that makes tokens is built; noise for sound. A block is handed to `step` when
it is complete, as a microphone would. A token of its start then is as old as the declared look-ahead plus the block's time. "switch" is
the first block of a window, which encodes the carried context again. x real time is seconds of audio per second of wall clock, of all
`step`s together and of one `encode`. One torch thread; on a CPU a second row gives the same in CPU time, which means something on a
busy machine too.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from speechquilt.recipes import defaults
from speechquilt.tokenizer.token_encoder import FRAME_SAMPLES, TokenEncoder, TokenEncoderConfig
from speechquilt.tokenizer.whisper_sizes import WHISPER, preset

TOY = "toy"
HEADER = (
    "| preset | context, s | look-ahead, ms | block, ms | clock | step, median ms | 95 % | switch, median ms "
    "| stream x real time | offline x real time | offline / stream |\n|" + " --- |" * 11
)


def config_of(name: str, context_s: float | None) -> TokenEncoderConfig:
    """The encoding part of a preset, with its own context or another."""
    config = (defaults.TOKENIZER.model if name == TOY else preset(name)).tokens_only()
    if context_s is None:
        return config
    return replace(config, context_frames=round(context_s * TokenEncoder.sample_rate / FRAME_SAMPLES))


@dataclass(frozen=True)
class Seconds:
    """Of one call: by the wall's clock and of this process on the CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Round:
    """`blocks` and `switches`: every `step` of a stream, those that begin a later window apart; `offline`: one `encode`."""

    blocks: list[Seconds]
    switches: list[Seconds]
    offline: Seconds


T = TypeVar("T")


def timed(function: Callable[[], T]) -> tuple[T, Seconds]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def block_frames(config: TokenEncoderConfig, num_frames: int) -> Iterator[tuple[int, bool]]:
    """The frames of every block of a clip, and whether it is the first of a later window."""
    frame = done = 0
    while done < num_frames:
        size = min(config.block_frames, config.max_frames - frame, num_frames - done)
        yield size, frame == config.context_frames and done >= config.max_frames
        done, frame = done + size, frame + size
        frame = config.context_frames if frame == config.max_frames else frame


def measured(model: TokenEncoder, wav_S: torch.Tensor, device: str) -> Round:
    """A stream and an `encode` of the same samples, whole frames."""
    state, ids, done = model.init_state(), [], 0
    blocks: list[Seconds] = []
    switches: list[Seconds] = []
    for num_frames, switch in block_frames(model.config, len(wav_S) // FRAME_SAMPLES):
        block_S = wav_S[done : done + num_frames * FRAME_SAMPLES]
        done += len(block_S)
        (ids_T, state), seconds = timed(partial(model.step, block_S, state, final=done == len(wav_S)))
        ids.append(ids_T)
        (switches if switch else blocks).append(seconds)
    num_samples_B = torch.tensor([len(wav_S)], device=device)
    (expected_BT, _), offline = timed(lambda: model.encode(wav_S[None].to(device), num_samples_B))
    # A vector half-way between two of these random codes may go either way when it is rounded otherwise.
    assert (torch.cat(ids) == expected_BT[0]).float().mean() > 0.99, "stream and offline give different tokens"
    return Round(blocks, switches, offline)


def row(name: str, model: TokenEncoder, rounds: Sequence[Round], clock: str, seconds: float) -> str:
    def of(times: Sequence[Seconds]) -> list[float]:
        return [getattr(t, clock) for t in times]

    blocks, switches = of([t for r in rounds for t in r.blocks]), of([t for r in rounds for t in r.switches])
    streamed = [sum(of(r.blocks) + of(r.switches)) for r in rounds]
    offline = of([r.offline for r in rounds])
    cells = [
        name,
        f"{model.context_samples / model.sample_rate:g}",
        f"{1000 * model.lookahead_s:.0f}",
        f"{1000 * model.config.block_frames * FRAME_SAMPLES / model.sample_rate:.0f}",
        clock,
        f"{1000 * statistics.median(blocks):.1f}",
        f"{1000 * np.quantile(blocks, 0.95):.1f}",
        f"{1000 * statistics.median(switches):.1f}" if switches else "-",
        f"{seconds / statistics.median(streamed):.1f}",
        f"{seconds / statistics.median(offline):.1f}",
        f"{statistics.median(s / o for s, o in zip(streamed, offline)):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=TOY, choices=[TOY, *WHISPER])
    parser.add_argument("--context-s", type=float, nargs="*", help="default: the preset's own")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.device}, {options.seconds:g} s of audio, {options.rounds} rounds\n{HEADER}")
    rng = np.random.default_rng(0)
    num_samples = round(options.seconds * TokenEncoder.sample_rate) // FRAME_SAMPLES * FRAME_SAMPLES
    wav_S = torch.from_numpy((0.1 * rng.standard_normal(num_samples)).astype(np.float32))
    for context_s in options.context_s or [None]:
        model = config_of(options.preset, context_s).build().eval().to(options.device)
        rounds = [measured(model, wav_S, options.device) for _ in range(options.rounds + 1)][1:]  # the first warms up
        for clock in ("wall", "cpu") if options.device == "cpu" else ("wall",):
            print(row(options.preset, model, rounds, clock, options.seconds), flush=True)


if __name__ == "__main__":
    main()
