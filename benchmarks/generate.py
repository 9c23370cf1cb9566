"""Speech generation with `step`: tokens per second of the LST against the plain baseline of the same preset, in one run.

    python benchmarks/generate.py [--preset 420M] [--patch 4] [--rows 1]
    python benchmarks/generate.py --rows 8 --apart
    python benchmarks/generate.py --text-path bypass    # a head over speech alone

The LST runs its global transformer once per patch, the baseline once per token; the local modules run for every token.
Random weights, the same spoken prompt, the likeliest speech token each time, key-value caches in both. The models take turns;
printed is the ratio of median tokens per second, above 1 where the LST is faster: CPU time on a CPU, which other programs
disturb least. The length of the prompt counts, because attention grows with it.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from speechquilt.model import ladder
from speechquilt.model.latent import LatentLM
from speechquilt.model.patcher import StaticPatcher
from speechquilt.model.plain import PlainLM
from speechquilt.vocab import Vocab

VOCAB = Vocab(num_text=32_000, num_speech=501)


class Speaker:
    """One model that speaks on in several rows, and what each turn took."""

    def __init__(self, name: str, model: PlainLM | LatentLM, patch: int, arguments: argparse.Namespace) -> None:
        self.name, self.model, self.patcher = name, model, StaticPatcher(patch)
        self.device = torch.device(arguments.device)
        rounds_and_warm_up = arguments.rounds + 1
        longest = arguments.prompt + patch + rounds_and_warm_up * arguments.tokens
        self.state: Any = model.init_state(arguments.rows, longest)
        self.patch_states = [self.patcher.init_state()] * arguments.rows
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.tokens_per_s: list[float] = []

    def hear(self, prompts: list[torch.Tensor]) -> None:
        """One prompt per row, of any lengths; the last token of each is the first that `speak` reads."""
        for t in range(max(len(ids_T) for ids_T in prompts) - 1):
            active = [t < len(ids_T) - 1 for ids_T in prompts]
            self._step(torch.stack([ids_T[min(t, len(ids_T) - 1)] for ids_T in prompts]), active)
        self.ids_B = torch.stack([ids_T[-1] for ids_T in prompts])

    def speak(self, num_tokens: int) -> None:
        """So many tokens in every row; their rate is kept."""
        self._wait()
        started = self.clock()
        for _ in range(num_tokens):
            logits_BV = self._step(self.ids_B, [True] * len(self.ids_B))
            speech_BV = logits_BV[:, VOCAB.speech_start : VOCAB.speech_start + VOCAB.num_speech]
            self.ids_B = VOCAB.speech_start + speech_BV.argmax(1)
        self._wait()
        self.tokens_per_s.append(num_tokens * len(self.ids_B) / (self.clock() - started))

    def _step(self, ids_B: torch.Tensor, active: list[bool]) -> torch.Tensor:
        opens, closes = [False] * len(active), [False] * len(active)
        for b in range(len(active)):
            if active[b]:
                opens[b], closes[b], self.patch_states[b] = self.patcher.step(0, True, self.patch_states[b])
        flags = (torch.tensor(x, device=self.device) for x in (opens, closes))
        active_B = None if all(active) else torch.tensor(active, device=self.device)
        logits_BV, self.state = self.model.step(ids_B, *flags, self.state, active_B)
        return logits_BV

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def spoken_prompts(arguments: argparse.Namespace) -> list[torch.Tensor]:
    """Random speech; with `--apart` row b has b % patch tokens more, so that patches close at different times."""
    generator = torch.Generator().manual_seed(0)
    lengths = [arguments.prompt + (b % arguments.patch if arguments.apart else 0) for b in range(arguments.rows)]
    prompts = [torch.randint(0, VOCAB.num_speech, (length,), generator=generator) for length in lengths]
    return [(VOCAB.speech_start + ids_T).to(arguments.device) for ids_T in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=ladder.NAMES, default="420M")
    parser.add_argument("--patch", type=int, default=4, help="speech tokens per patch")
    parser.add_argument("--text-path", choices=("decoder", "bypass"), default="decoder", help="of the LST")
    parser.add_argument("--rows", type=int, default=1, help="sequences spoken side by side")
    parser.add_argument("--apart", action="store_true", help="patches of the rows close at different times")
    parser.add_argument("--prompt", type=int, default=64, help="speech tokens heard before")
    parser.add_argument("--tokens", type=int, default=16, help="speech tokens per round and row; a multiple of --patch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count; one more warms up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.tokens % arguments.patch:
        parser.error(
            f"--tokens={arguments.tokens} must be a multiple of --patch={arguments.patch}: whole patches a round"
        )
    torch.set_num_threads(arguments.threads)
    prompts = spoken_prompts(arguments)
    speakers = []
    lst = replace(ladder.latent(arguments.preset), text_path=arguments.text_path)
    for name, config in (("plain", ladder.plain(arguments.preset)), ("LST", lst)):
        model = config.for_vocab(VOCAB).build().to(arguments.device)
        speakers.append(Speaker(name, model, arguments.patch, arguments))
        speakers[-1].hear(prompts)
    for _ in range(arguments.rounds + 1):
        for speaker in speakers:
            speaker.speak(arguments.tokens)
    rates = {speaker.name: statistics.median(speaker.tokens_per_s[1:]) for speaker in speakers}
    ratio = rates["LST"] / rates["plain"]
    print(
        f"{arguments.preset}, {arguments.rows} rows, patches of {arguments.patch}: LST {rates['LST']:.1f}, "
        f"plain {rates['plain']:.1f} tokens/s, ratio {ratio:.2f}"
    )
    print(json.dumps({"arguments": vars(arguments), "tokens_per_s": rates, "ratio": ratio}))


if __name__ == "__main__":
    main()
