"""Parameters and FLOPs of every preset, as the Markdown table of docs/presets.md.

    python benchmarks/presets.py [--patch 4]

No model is run: parameters are counted on the meta device, FLOPs by the formulas of `speechquilt.model.flops` (tested
against torch's own counter), on the paper's mixture in full rows of 4096 units.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch

from speechquilt.model import ladder
from speechquilt.model.flops import BACKWARD, forward_flops, paper_row
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=32_000, num_speech=501)  # spec latent-speech-text 3.1
HEADER = (
    "| preset | model | global | local | vocabulary | parameters, M | training GFLOPs per token | of the baseline's |"
)


def models(name: str) -> Iterator[tuple[str, PlainLMConfig | LatentLMConfig]]:
    yield "plain", ladder.plain(name).for_vocab(VOCAB)
    latent = ladder.latent(name).for_vocab(VOCAB)
    yield "LST", latent
    yield "LST, text bypass", replace(latent, text_path="bypass")


def parameters(config: PlainLMConfig | LatentLMConfig) -> dict[str, int]:
    """Parameters of the global transformer, of the local modules, and of embeddings and heads."""
    with torch.device("meta"):
        model = PlainLM(config) if isinstance(config, PlainLMConfig) else LatentLM(config)
    counts = {"global": 0, "local": 0, "vocabulary": 0}
    for name, p in model.named_parameters():
        part = "local"
        if name.startswith(("global_.", "llama.")):
            part = "global"
        elif name.startswith(("embedding", "head", "text_")):
            part = "vocabulary"
        counts[part] += p.numel()
    return counts


def training_flops_per_token(config: PlainLMConfig | LatentLMConfig, patch: int) -> float:
    size = paper_row(config, patch)
    return (1 + BACKWARD) * sum(forward_flops(config, size).values()) / size.tokens


def table(patch: int) -> str:
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for name in ladder.NAMES:
        baseline = training_flops_per_token(ladder.plain(name).for_vocab(VOCAB), 1)
        for kind, config in models(name):
            count = parameters(config)
            flops = training_flops_per_token(config, 1 if kind == "plain" else patch)
            cells = [name, kind, *(f"{n / 1e6:,.1f}" for n in (*count.values(), sum(count.values())))]
            lines.append("| " + " | ".join([*cells, f"{flops / 1e9:.3f}", f"{flops / baseline:.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", type=int, default=4, help="speech tokens per patch")
    print(table(parser.parse_args().patch))


if __name__ == "__main__":
    main()
