"""`speechquilt plan RECIPE --gpus N`: what a run of the papers' size costs, before anybody rents a machine.

Place in the pipeline: layer 4, beside the recipes; arithmetic alone, nothing is trained. FLOPs come from `model.flops`,
tokens and hours from the papers (spec 1: synthetic-interleaved, spec 2: latent-speech-text).
Trap: a plan is as good as its throughputs. Each line says where its own comes from: "stated" by a publication, "assumed" by
us. None of them was measured by this project on such machines.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from speechquilt.config import nearest
from speechquilt.model import ladder
from speechquilt.model.flops import BACKWARD, forward_flops, paper_row
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes import tokenizers
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.vocab import Vocab

BYTES_PER_PARAMETER = 16  # float32 weights, gradients and two moments, all sharded
BYTES_PER_TOKEN = 2.5  # of a Parquet shard of ids, compressed (assumed)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense bfloat16 peak in FLOP/s, memory in GiB."""

    peak: float
    memory_gib: float


GPUS = {
    "a100": Gpu(peak=312e12, memory_gib=80),
    "h100": Gpu(peak=989e12, memory_gib=80),
    "h200": Gpu(peak=989e12, memory_gib=141),
    "b200": Gpu(peak=2250e12, memory_gib=180),
}


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """`amount` of `unit` at `per_gpu_s` of them per GPU and second; `memory_gib` per GPU where it is known."""

    name: str
    amount: float
    unit: str
    per_gpu_s: float
    source: str
    storage_gb: float = 0.0
    memory_gib: float | None = None

    @property
    def gpu_hours(self) -> float:
        return self.amount / self.per_gpu_s / 3600


def training(
    name: str,
    config: PlainLMConfig | LatentLMConfig,
    *,
    units: float,
    patch: int,
    row_units: int,
    gpu: Gpu,
    gpus: int,
    mfu: float,
) -> StagePlan:
    """A training run from its FLOPs; one row per GPU and step, weights sharded over all GPUs, blocks recomputed."""
    size = paper_row(config, patch, row_units)
    per_unit = (1 + BACKWARD) * sum(forward_flops(config, size).values()) / size.units
    parameters = _parameters(config)
    stack = config.llama if isinstance(config, PlainLMConfig) else config.global_
    kept = 2 * stack.width * stack.num_layers * row_units  # bfloat16 inputs of the blocks
    logits = 3 * 4 * config.vocab_size * size.tokens  # float32 logits, their gradient and the softmax
    memory = BYTES_PER_PARAMETER * parameters / gpus + kept + logits + 2 * 3 * parameters / stack.num_layers
    return StagePlan(
        name=name,
        amount=units,
        unit="units",
        per_gpu_s=gpu.peak * mfu / per_unit,
        source=f"assumed: {mfu:.0%} of peak, {per_unit / 1e9:.2f} GFLOPs per unit, {parameters / 1e9:.2f}B parameters",
        storage_gb=12 * parameters / 1e9,  # a checkpoint: weights and moments
        memory_gib=memory / 2**30,
    )


def lst_1b(gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """The LST paper's 1B run: 200k steps of 0.5M units over interleaved data and text, 1 : 2 by tokens (spec 2, 4, 7)."""
    hours, vocab = 164_783, Vocab(num_text=32_000, num_speech=501)
    speech_tokens = hours * 3600 * 25.0
    config = ladder.latent("1.4B").for_vocab(vocab)
    return [
        _tokenizing(hours, speech_tokens),
        StagePlan(
            name="align",
            amount=hours,
            unit="hours of speech",
            per_gpu_s=220 / 3600,
            source="assumed: an aligner as fast as a tokenizer",
            storage_gb=0.2 * speech_tokens / 1e9,
        ),
        training("pretrain", config, units=200_000 * 524_288, patch=4, row_units=4096, gpu=gpu, gpus=gpus, mfu=mfu),
    ]


def interleaved_9b(gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """The first paper's 9B run: 1T tokens, 600B of them interleaved through a text-to-token model (spec 1, 2.5, 4, 6)."""
    stack = LlamaConfig(width=4096, num_layers=40, num_heads=32, num_kv_heads=2, ffn_width=13_696)
    config = PlainLMConfig(vocab_size=168_960, llama=stack)
    return _synthetic(config, 1e12, gpu, gpus, mfu)


def interleaved_1b(gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """The same at the size of the first paper's ablations, with a tenth of its tokens (a choice: theirs is unknown)."""
    config = ladder.plain("1.4B").for_vocab(Vocab(num_text=150_000, num_speech=16_384))
    return _synthetic(config, 1e11, gpu, gpus, mfu)


def tokenizer_large(gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """`train tokenizer preset=large`: the first paper's tokenizer, 2 epochs of 933,000 hours (spec 1, 2.5)."""
    return [_tokenizer_training(tokenizers.LARGE, tokenizers.PAPER_RANKS, gpu, mfu)]


def tokenizer_small(gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """`train tokenizer preset=small`: LibriSpeech's 960 hours ten times."""
    return [_tokenizer_training(tokenizers.RECIPES["small"], 1, gpu, mfu)]


RECIPES: dict[str, Callable[[Gpu, int, float], list[StagePlan]]] = {
    "lst_1b": lst_1b,
    "interleaved_9b": interleaved_9b,
    "interleaved_1b": interleaved_1b,
    "tokenizer_large": tokenizer_large,
    "tokenizer_small": tokenizer_small,
}


def _tokenizer_training(recipe: TokenizerRecipe, ranks: int, gpu: Gpu, mfu: float) -> StagePlan:
    """The audio of a recipe made for `ranks`; weights, gradients and moments lie whole on every GPU."""
    cost = tokenizers.cost(recipe, ranks=ranks, mfu=mfu, peak_flops=gpu.peak)
    seconds = cost.audio_hours * 3600
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SupervisedTokenizer(recipe.model).parameters())
    return StagePlan(
        name="tokenizer",
        amount=seconds,
        unit="seconds of audio",
        per_gpu_s=gpu.peak * mfu * seconds / cost.flops,
        source=f"assumed: {mfu:.0%} of peak, {cost.flops / seconds / 1e9:.1f} GFLOPs per second of audio, clips of "
        f"{tokenizers.CLIP_S:g} s; memory is that of {parameters / 1e9:.2f}B parameters alone, without activations",
        storage_gb=12 * parameters / 1e9,  # a checkpoint: weights and moments
        memory_gib=BYTES_PER_PARAMETER * parameters / 2**30,
    )


def _synthetic(config: PlainLMConfig, tokens: float, gpu: Gpu, gpus: int, mfu: float) -> list[StagePlan]:
    """Tokenizer, text-to-token model, its spans, then the language model; 60.5 % interleaved, of which 62 % is speech."""
    hours = 700_000 * tokens / 1e12
    spans = 0.605 * 0.62 * tokens
    whisper_flops = 3 * 2 * 1.54e9 * 1500 / 30  # per second of audio: 1.54B parameters, 1500 frames in 30 s
    return [
        StagePlan(
            name="tokenizer",
            amount=2 * 4 / 3 * hours * 3600,
            unit="seconds of audio",
            per_gpu_s=gpu.peak * mfu / whisper_flops,
            source=f"assumed: {mfu:.0%} of peak; 2 epochs, supervised : pseudo-labelled 1 : 3",
            storage_gb=12 * 1.54,
        ),
        _tokenizing(hours, hours * 3600 * 12.5),
        StagePlan(
            name="interleave",
            amount=spans,
            unit="speech tokens",
            per_gpu_s=25_000 * gpu.peak / GPUS["h100"].peak,
            source="stated: 25k tokens/s of a 1.5B text-to-token model on one H800",
            storage_gb=BYTES_PER_TOKEN * 0.605 * tokens / 1e9,
        ),
        training("pretrain", config, units=tokens, patch=1, row_units=8192, gpu=gpu, gpus=gpus, mfu=mfu),
    ]


def _tokenizing(hours: float, tokens: float) -> StagePlan:
    return StagePlan(
        name="tokenize",
        amount=hours,
        unit="hours of speech",
        per_gpu_s=220 / 3600,
        source="stated: 220 x real time of a comparable tokenizer on one RTX 3090",
        storage_gb=BYTES_PER_TOKEN * tokens / 1e9,
    )


def _parameters(config: PlainLMConfig | LatentLMConfig) -> int:
    with torch.device("meta"):
        model = PlainLM(config) if isinstance(config, PlainLMConfig) else LatentLM(config)
    return sum(p.numel() for p in model.parameters())


def plan(recipe: str, gpus: int, gpu: str, mfu: float) -> dict[str, Any]:
    """Plain JSON data: a line per stage and the totals. Raises ValueError on a name or number that makes no sense."""
    for what, name, known in (("recipe", recipe, RECIPES), ("gpu", gpu, GPUS)):
        if name not in known:
            raise ValueError(f"{what} {name!r} is unknown; {nearest(name, list(known))}")
    if gpus < 1 or not 0 < mfu <= 1:
        raise ValueError(f"gpus={gpus} must be at least 1 and mfu={mfu} between 0 and 1")
    stages = RECIPES[recipe](GPUS[gpu], gpus, mfu)
    lines = [{**asdict(s), "gpu_hours": s.gpu_hours, "hours": s.gpu_hours / gpus} for s in stages]
    for line, stage in zip(lines, stages):
        line["fits"] = stage.memory_gib is None or stage.memory_gib < GPUS[gpu].memory_gib
    return {
        "recipe": recipe,
        "gpu": gpu,
        "gpus": gpus,
        "stages": lines,
        "gpu_hours": sum(s.gpu_hours for s in stages),
        "hours": sum(s.gpu_hours for s in stages) / gpus,
        "storage_gb": sum(s.storage_gb for s in stages),
    }


def show(recipe: str, gpus: int, gpu: str, mfu: float, as_json: bool) -> None:
    """`speechquilt plan`."""
    data = plan(recipe, gpus, gpu, mfu)
    if as_json:
        print(json.dumps(data, indent=1))
        return
    print(f"{recipe} on {gpus} x {gpu}: {RECIPES[recipe].__doc__}\n")
    print(f"{'stage':<12}{'amount':>10} {'unit':<18}{'GPU-hours':>11}{'hours':>9}{'storage':>10}{'memory/GPU':>12}")
    for s in data["stages"]:
        memory = "" if s["memory_gib"] is None else f"{s['memory_gib']:.0f} GiB" + ("" if s["fits"] else " !")
        print(
            f"{s['name']:<12}{s['amount']:>10.3g} {s['unit']:<18}{s['gpu_hours']:>11,.0f}{s['hours']:>9,.1f}"
            f"{s['storage_gb']:>7,.0f} GB{memory:>12}"
        )
    print(f"{'all':<41}{data['gpu_hours']:>11,.0f}{data['hours']:>9,.1f}{data['storage_gb']:>7,.0f} GB\n")
    for s in data["stages"]:
        print(f"{s['name']}: {s['source']}")
