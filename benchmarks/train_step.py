"""Forward and backward of the LST against the plain baseline of the same preset, on the same data, in one run.

    python benchmarks/train_step.py [--preset 420M] [--patch 4] [--rounds 5]
    python benchmarks/train_step.py --preset 1.1B --units 4096 --rows 4 --device cuda --dtype bfloat16 --compile

Prints, per speech-and-text token, the ratios of units, of FLOPs and of seconds (median over rounds in which the models take
turns; on a CPU the time of one thread), and how much of the FLOPs' saving is real time. On a GPU also units per second and
MFU, local modules counted. The optimizer is left out: its work depends on the parameters, not on the data.
The data imitate the paper's mixture: 1 part interleaved documents, 2 parts text, lengths as in its section on data.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from speechquilt.data.feed.mixture import Mixture
from speechquilt.data.feed.pack import PackConfig, PackedLoader
from speechquilt.data.interleaving.parallel import draw_blocks
from speechquilt.model import ladder
from speechquilt.model.flops import training_flops
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.throughput import peak_flops
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=32_000, num_speech=501)
SPEECH_PER_WORD, TEXT_PER_WORD = 9.4, 1.4  # tokens, silence included (spec latent-speech-text 3.3 and 4)


def documents(count: int, units_per_row: int, seed: int = 0) -> dict[str, list[Document]]:
    """Random ids in realistic lengths: interleaved documents of up to 60 words, text of about a quarter of a row."""
    rng = np.random.default_rng(seed)

    def text(num_words: float) -> Segment:
        return Segment(modality="text", ids_T=rng.integers(0, VOCAB.num_text, max(1, round(TEXT_PER_WORD * num_words))))

    def speech(num_words: int) -> Segment:
        num_tokens = max(1, rng.poisson(SPEECH_PER_WORD * num_words))
        return Segment(modality="speech", ids_T=rng.integers(0, VOCAB.num_speech, num_tokens))

    def interleaved() -> tuple[Segment, ...]:
        blocks = draw_blocks(int(rng.integers(20, 60)), rng)
        return tuple(text(b - a) if modality == "text" else speech(b - a) for modality, a, b in blocks)

    def plain_text() -> tuple[Segment, ...]:
        words = rng.lognormal(np.log(units_per_row / 8), 0.8)
        return (text(min(words, units_per_row / 2)),)

    return {
        "interleaved": [Document(id=f"i{i}", source="i", segments=interleaved()) for i in range(count)],
        "text": [Document(id=f"t{i}", source="t", segments=plain_text()) for i in range(count)],
    }


@dataclass
class Contestant:
    """One model with its own loader over the same documents."""

    name: str
    config: PlainLMConfig | LatentLMConfig
    loader: PackedLoader
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    seconds: list[float] = field(default_factory=list)  # per token, one per round
    totals: dict[str, float] = field(
        default_factory=lambda: {"tokens": 0.0, "units": 0.0, "flops": 0.0, "seconds": 0.0}
    )

    def __post_init__(self) -> None:
        model = self.config.build().to(self.device)
        if self.compiled:
            for block in model.blocks():
                block.compile()
        self.model, self.objective = model, NextTokenObjective(VOCAB)

    def run(self, steps: int, *, counted: bool) -> None:
        """A round: so many batches, made before the clock starts."""
        batches = [self.loader.next_batch().to(self.device) for _ in range(steps)]
        started = self._clock()
        for batch in batches:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss, weight, _ = self.objective(self.model, batch)
            (loss / weight).backward()
            self.model.zero_grad()
        seconds = self._clock() - started
        if counted:
            tokens = sum(b.meta["tokens"] for b in batches)
            self.seconds.append(seconds / tokens)
            self.totals["tokens"] += tokens
            self.totals["units"] += sum(b.meta["units"] for b in batches)
            self.totals["flops"] += sum(training_flops(self.config, b) for b in batches)
            self.totals["seconds"] += seconds

    def _clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()  # one thread: what it used, whatever else the machine does
        torch.cuda.synchronize()
        return time.perf_counter()

    def per_token(self) -> dict[str, float]:
        tokens = self.totals["tokens"]
        return {
            "units": self.totals["units"] / tokens,
            "flops": self.totals["flops"] / tokens,
            "seconds": statistics.median(self.seconds),
        }


def contestants(arguments: argparse.Namespace) -> Iterator[Contestant]:
    sources = documents(400, arguments.units)
    plain = ladder.plain(arguments.preset).for_vocab(VOCAB)
    latent = ladder.latent(arguments.preset).for_vocab(VOCAB)
    for name, config, kind in (
        ("plain", plain, "none"),
        ("LST", latent, "static"),
        ("LST, text bypass", replace(latent, text_path="bypass"), "static"),
    ):
        loader = PackConfig(
            rows=arguments.rows,
            units_per_row=arguments.units,
            tokens_per_row=2 * arguments.units,
            round_tokens_to=arguments.round_tokens_to,
        ).build(
            Mixture(sources, {"interleaved": 1.0, "text": 2.0}, 0),
            VOCAB,
            None if kind == "none" else PatcherConfig(kind="static", patch_size=arguments.patch).build(),
            seed=0,
            total_batches=10_000,
        )
        device = torch.device(arguments.device)
        yield Contestant(name, config, loader, device, getattr(torch, arguments.dtype), arguments.compile)


def report(entrants: list[Contestant]) -> list[dict[str, Any]]:
    """Ratios to the first one; the share of the FLOPs' saving that is saved time."""
    base = entrants[0].per_token()
    rows: list[dict[str, Any]] = []
    for entrant in entrants:
        ratio = {key: value / base[key] for key, value in entrant.per_token().items()}
        row: dict[str, Any] = {"model": entrant.name, **{key: round(value, 3) for key, value in ratio.items()}}
        if ratio["flops"] < 1:
            row["share_of_flops_saving"] = round((1 - ratio["seconds"]) / (1 - ratio["flops"]), 2)
        if entrant.device.type == "cuda":
            seconds = entrant.totals["seconds"]
            row["units_per_s"] = round(entrant.totals["units"] / seconds)
            row["mfu"] = round(entrant.totals["flops"] / seconds / peak_flops(entrant.device), 3)
            row["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ladder.NAMES, default="420M")
    parser.add_argument("--patch", type=int, default=4, help="speech tokens per patch")
    parser.add_argument("--rows", type=int, default=1, help="rows per batch")
    parser.add_argument("--units", type=int, default=512, help="units per row")
    parser.add_argument("--steps", type=int, default=1, help="batches per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up")
    parser.add_argument("--round-tokens-to", type=int, default=32, help="1024 or more on a GPU: few shapes to compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entrants = list(contestants(arguments))
    for round_number in range(arguments.rounds + 1):
        for entrant in entrants:
            entrant.run(arguments.steps, counted=round_number > 0)
    rows = report(entrants)
    print(
        f"per token, {arguments.preset}, patches of {arguments.patch}, {arguments.rows} x {arguments.units} units a step:"
    )
    for row in rows:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
    print(json.dumps({"arguments": vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
