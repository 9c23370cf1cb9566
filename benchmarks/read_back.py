"""Reading tokens back with the attention decoder: with its cache against recomputing everything at every id, in one run.

    python benchmarks/read_back.py [--size tiny] [--rows 8] [--seconds 10] [--ids 40]

Decoders of Whisper's sizes at 12.5 Hz, random weights; every row writes `--ids` likeliest ids, whatever they are. The cache keeps
the keys and values of the text so far and of the audio, and computes logits of the last position only; recomputing does neither,
as before the cache. Both take turns and must write the same ids. Printed is the ratio of median times, CPU time on a CPU; it grows
with the length of the texts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from speechquilt.tokenizer.heads import TextDecoder
from speechquilt.tokenizer.whisper_sizes import WHISPER, preset


def with_cache(model: TextDecoder, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, num_ids: int) -> torch.Tensor:
    """-> ids `[B, num_ids]`."""
    ids_BL, written = _prompts(model, states_BTD), []
    state = model.init_state(states_BTD, num_tokens_B)
    for _ in range(num_ids):
        logits_BV, state = model.step(ids_BL, state)
        ids_BL = logits_BV.argmax(-1, keepdim=True)
        written.append(ids_BL)
    return torch.cat(written, 1)


def recomputed(model: TextDecoder, states_BTD: torch.Tensor, num_tokens_B: torch.Tensor, num_ids: int) -> torch.Tensor:
    """-> ids `[B, num_ids]`."""
    ids_BL = _prompts(model, states_BTD)
    for _ in range(num_ids):
        logits_BLV = model(ids_BL, states_BTD, num_tokens_B)
        ids_BL = torch.cat([ids_BL, logits_BLV[:, -1].argmax(-1, keepdim=True)], 1)
    return ids_BL[:, -num_ids:]


def _prompts(model: TextDecoder, states_BTD: torch.Tensor) -> torch.Tensor:
    return torch.tensor(model.prompt, device=states_BTD.device).expand(len(states_BTD), -1)


WAYS: dict[str, Callable[..., torch.Tensor]] = {"cache": with_cache, "recomputed": recomputed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=WHISPER, default="tiny")
    parser.add_argument("--rows", type=int, default=8, help="token sequences read side by side")
    parser.add_argument("--seconds", type=float, default=10.0, help="of speech in the longest row; others have less")
    parser.add_argument("--ids", type=int, default=40, help="text ids per row")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = preset(arguments.size).build().decoder.eval().to(arguments.device)
    num_tokens = round(arguments.seconds / model.token_s)
    states_BTD = torch.randn(arguments.rows, num_tokens, model.embed_tokens.embedding_dim, device=arguments.device)
    num_tokens_B = torch.linspace(num_tokens, num_tokens / 2, arguments.rows, device=arguments.device).long()
    on_cpu = arguments.device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 1):
            written = {}
            for name, way in WAYS.items():
                started = clock()
                written[name] = way(model, states_BTD, num_tokens_B, arguments.ids).tolist()  # waits for the device
                seconds[name].append(clock() - started)
            assert written["cache"] == written["recomputed"], "the cache changes what is read"
    median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    ratio = median["recomputed"] / median["cache"]
    print(
        f"{arguments.size}, {arguments.rows} rows of up to {arguments.seconds:g} s, {arguments.ids} ids each: "
        f"{median['cache']:.2f} s with the cache, {median['recomputed']:.2f} s recomputed, ratio {ratio:.1f}"
    )
    print(json.dumps({"arguments": vars(arguments), "seconds": median, "ratio": ratio}))


if __name__ == "__main__":
    main()
