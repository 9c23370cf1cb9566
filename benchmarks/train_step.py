"""Training step of a latent model against the plain baseline, same global transformer, same documents, in one run.

    python benchmarks/train_step.py [--patch 2] [--steps 10]

Prints the ratio of seconds per speech-and-text token (CPU time, one thread) beside the ratios of units and of FLOPs.
"""

import argparse
import time

import numpy as np
import torch

from speechquilt.data.mixture import Mixture
from speechquilt.data.pack import PackConfig
from speechquilt.model.flops import training_flops
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model import presets
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.types import Document, Segment
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=600, num_speech=256)


def documents(count: int) -> list[Document]:
    """Half a document's tokens speech, half text, in lengths like the toy's."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        text = Segment(modality="text", ids_T=rng.integers(0, 600, rng.integers(20, 60)))
        speech = Segment(modality="speech", ids_T=rng.integers(0, 256, rng.integers(20, 60)))
        made.append(Document(id=str(i), segments=(text, speech), source="x"))
    return made


def measure(kind: str, patch: int, steps: int) -> dict[str, float]:
    config = presets.plain("toy", VOCAB.size) if kind == "plain" else presets.latent("toy", VOCAB.size)
    patcher = PatcherConfig(kind="none" if kind == "plain" else "static", patch_size=patch).build()
    loader = PackConfig(rows=4, units_per_row=256, tokens_per_row=768).build(
        Mixture({"x": documents(400)}, {"x": 1.0}, 0), VOCAB, patcher, seed=0, total_batches=steps
    )
    model = config.build()
    objective = NextTokenObjective(VOCAB)
    totals = {"seconds": 0.0, "tokens": 0.0, "units": 0.0, "flops": 0.0}
    for step in range(steps + 2):
        batch = loader.next_batch()
        started = time.process_time()
        loss, weight, _ = objective(model, batch)
        (loss / weight).backward()
        model.zero_grad()
        if step >= 2:  # the first two warm up
            totals["seconds"] += time.process_time() - started
            totals["tokens"] += batch.meta["tokens"]
            totals["units"] += batch.meta["units"]
            totals["flops"] += training_flops(config, batch)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, latent = (measure(kind, arguments.patch, arguments.steps) for kind in ("plain", "latent"))
    print(f"latent / plain per token, patches of {arguments.patch}, {arguments.steps} steps each:")
    for key in ("seconds", "units", "flops"):
        print(f"  {key:<8} {latent[key] / latent['tokens'] / (plain[key] / plain['tokens']):.2f}")


if __name__ == "__main__":
    main()
