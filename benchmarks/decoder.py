"""A speech decoder that streams, against one that makes everything again for each block (as the released one does), in one run.

    python benchmarks/decoder.py [--preset toy] [--seconds 16] [--sessions 8]

Random weights. Both give sound of the same tokens, block by block; "again" decodes all tokens so far at every block and keeps the end.
Printed are the ratio of their times, seconds for a second of sound (flow, vocoder, and many sessions at once), the time from a complete
first block to its samples, and the cost of the last blocks against the first ones behind a full prompt, which is about 1 when a block
costs the same however long the utterance is.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from speechquilt.decoder.speech_decoder import SpeechDecoder
from speechquilt.recipes import catalog, defaults
from speechquilt.stages.train_decoder import DecoderRecipe


def built(recipe: DecoderRecipe, device: str) -> SpeechDecoder:
    torch.manual_seed(0)
    flow = recipe.flow.build().eval().to(device)
    for parameter in flow.parameters():  # the first velocity of a new one is zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.01)
    return SpeechDecoder(flow, replace(recipe.phases, mel=recipe.flow.mel).build())


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("toy", "111m"), default="toy")
    parser.add_argument("--seconds", type=float, default=16.0, help="of speech")
    parser.add_argument("--sessions", type=int, default=8, help="utterances side by side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = defaults.DECODER if arguments.preset == "toy" else catalog.load("decoder_111m").recipe
    decoder = built(recipe, arguments.device)
    flow, block = decoder.flow, recipe.flow.stream.chunk_tokens[-1]
    num_blocks = max(8, round(arguments.seconds * flow.config.token_rate / block))
    ids_T = torch.randint(flow.config.codebook_size, (num_blocks * block,))
    decoder.step(ids_T[:block], decoder.init_state())  # warms up

    state, blocks_s, flow_s, flow_state, vocoder_s, vocoder_state = (
        decoder.init_state(),
        [],
        [],
        flow.init_state(),
        [],
        decoder.vocoder.init_state(),
    )
    for first in range(0, len(ids_T), block):
        part_T = ids_T[first : first + block]

        def both(part_T: torch.Tensor = part_T) -> None:
            nonlocal state
            _, state = decoder.step(part_T, state)

        blocks_s.append(timed(both))
    for first in range(0, len(ids_T), block):
        begin = time.perf_counter()
        mel_MF, flow_state = flow.step(ids_T[first : first + block], flow_state)
        flow_s.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        _, vocoder_state = decoder.vocoder.step(mel_MF, vocoder_state)
        vocoder_s.append(time.perf_counter() - begin)
    again_s = [
        timed(lambda end=end: decoder.speak([ids_T[:end].numpy()])) for end in range(block, len(ids_T) + 1, block)
    ]  # type: ignore[misc]
    states = [decoder.init_state(seed) for seed in range(arguments.sessions)]
    many_s = timed(lambda: decoder.step_many([ids_T] * len(states), states, [True] * len(states)))

    seconds, filled = len(ids_T) / flow.config.token_rate, recipe.flow.stream.prompt_tokens // block
    found = {
        "preset": arguments.preset,
        "device": arguments.device,
        "threads": arguments.threads,
        "seconds": seconds,
        "again_over_streaming": sum(again_s) / sum(blocks_s),
        "real_time_factor": sum(blocks_s) / seconds,
        "real_time_factor_flow": sum(flow_s) / seconds,
        "real_time_factor_vocoder": sum(vocoder_s) / seconds,
        "real_time_factor_sessions": many_s / seconds / len(states),
        "first_block_s": blocks_s[0],
        "block_s": statistics.median(blocks_s[filled:]),
        "late_over_early": statistics.median(blocks_s[-2:]) / statistics.median(blocks_s[filled : filled + 2]),
    }
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}))


if __name__ == "__main__":
    main()
