"""A training step of our plain model against transformers' LlamaForCausalLM: same sizes, weights, batch and optimizer.

    python benchmarks/hf_llama.py [--size 20M] [--rows 4] [--tokens 512] [--rounds 10]
    python benchmarks/hf_llama.py --size 420M --rows 1 --rounds 3
    python benchmarks/hf_llama.py --size 420M --rows 8 --tokens 2048 --device cuda --dtype bfloat16 --compile

A step is forward, loss, backward and AdamW (ours, for both). Each row is one document, so transformers' causal attention
(sdpa) has the same work to do. The models take turns; printed is the ratio of median seconds per step, below 1 where ours is
faster: CPU time on a CPU, which other programs disturb least. Before the clock starts the two losses must agree.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from speechquilt.model import ladder
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.nn.hugging_face import EMBEDDING, HEAD, hugging_face_config
from speechquilt.nn.llama import LlamaConfig
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.optim import adamw
from speechquilt.types import IGNORE, Batch
from speechquilt.vocab import Vocab

SMALL = Vocab(num_text=8_000, num_speech=501)
LARGE = Vocab(num_text=32_000, num_speech=501)
SIZES = {
    "20M": (LlamaConfig(width=384, num_layers=8, num_heads=6, num_kv_heads=6, ffn_width=1024), SMALL),
    "100M": (LlamaConfig(width=768, num_layers=12, num_heads=12, num_kv_heads=12, ffn_width=2048), SMALL),
    "420M": (ladder.global_transformer("420M"), LARGE),
}


def one_document_per_row(rows: int, tokens: int, vocab: Vocab) -> Batch:
    ids_BT = torch.from_numpy(np.random.default_rng(0).integers(0, vocab.num_text, (rows, tokens)))
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full_like(ids_BT[:, :1], IGNORE)], dim=1)
    counts = {"tokens": rows * tokens, "speech_tokens": 0, "units": rows * tokens, "speech_units": 0}
    return Batch(ids_BT=ids_BT, labels_BT=labels_BT, doc_BT=torch.zeros_like(ids_BT), meta=counts)


def theirs_like(ours: PlainLM, vocab: Vocab) -> LlamaForCausalLM:
    """transformers' model with our weights, `use_cache` off as in its own training loop."""
    config = TheirConfig(**hugging_face_config(ours.config.llama, vocab), attn_implementation="sdpa", use_cache=False)
    model = LlamaForCausalLM(config)
    weights = {f"model.{name}": weight for name, weight in ours.llama.state_dict().items()}
    model.load_state_dict(weights | {EMBEDDING: ours.embedding.weight.detach(), HEAD: ours.head.weight.detach()})
    return model


class Contestant:
    """One model, its way to a mean loss, and its optimizer."""

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor], arguments: argparse.Namespace) -> None:
        self.model, self.loss, self.device = model, loss, torch.device(arguments.device)
        self.dtype = getattr(torch, arguments.dtype)
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        moments = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
        self.optimizer = adamw(model, lr=1e-4, device=self.device, **moments)
        self.seconds: list[float] = []

    def step(self) -> tuple[float, float]:
        """-> loss before the update, seconds of the step."""
        self._wait()
        started = self.clock()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return float(loss.detach()), self.clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contestants(arguments: argparse.Namespace) -> tuple[Contestant, Contestant]:
    """Ours and theirs."""
    llama, vocab = SIZES[arguments.size]
    ours = PlainLMConfig(vocab_size=vocab.size, llama=llama).build()
    theirs = theirs_like(ours, vocab).to(arguments.device)
    ours = ours.to(arguments.device)
    if arguments.compile:
        for block in (*ours.blocks(), *theirs.model.layers):
            block.compile()
    batch = one_document_per_row(arguments.rows, arguments.tokens, vocab).to(arguments.device)
    objective = NextTokenObjective(vocab)

    def our_loss() -> torch.Tensor:
        loss, weight, _ = objective(ours, batch)
        return loss / weight

    def their_loss() -> torch.Tensor:
        return theirs(input_ids=batch.ids_BT, labels=batch.ids_BT).loss

    return Contestant(ours, our_loss, arguments), Contestant(theirs, their_loss, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="20M", help="about so many parameters")
    parser.add_argument("--rows", type=int, default=4, help="rows per batch")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each model that count; one more warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of both models")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ours, theirs = contestants(arguments)
    losses = [entrant.step()[0] for entrant in (ours, theirs)]
    if abs(losses[0] - losses[1]) > 0.01 * losses[1]:
        raise SystemExit(
            f"the losses differ, {losses[0]:.4f} and {losses[1]:.4f}: not the same model, so no comparison"
        )
    for round_number in range(arguments.rounds):
        for entrant in (ours, theirs) if round_number % 2 else (theirs, ours):
            entrant.seconds.append(entrant.step()[1])
    medians = [statistics.median(entrant.seconds) for entrant in (ours, theirs)]
    ratio = medians[0] / medians[1]
    millions = sum(p.numel() for p in ours.model.parameters()) / 1e6
    print(
        f"training step, {millions:.0f} M parameters, {arguments.rows} x {arguments.tokens} tokens: "
        f"ours {medians[0]:.3f} s, transformers {medians[1]:.3f} s, ratio {ratio:.3f}"
    )
    print(json.dumps({"arguments": vars(arguments), "ours_s": medians[0], "theirs_s": medians[1], "ratio": ratio}))


if __name__ == "__main__":
    main()
