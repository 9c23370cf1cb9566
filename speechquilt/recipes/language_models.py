"""The papers' pre-training runs: each one object that training, planning and tests read.

Settings are those of spec latent-speech-text 6 to 8 and synthetic-interleaved 6; what the papers do not say is marked "choice".
None of them has been run here.
"""

from dataclasses import replace

from speechquilt.data.feed.pack import PackConfig
from speechquilt.model import ladder
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes.mixtures import MIXTURES
from speechquilt.stages.cost import DataPlan, PaperRun
from speechquilt.stages.train_lm import LMRecipe
from speechquilt.train.trainer import TrainConfig
from speechquilt.vocab import Vocab

# The LST paper (spec latent-speech-text 7).
ROW_UNITS = 4096
ROW_TOKENS = 8192  # choice: a row is full by units or by tokens
ROWS = 128  # of 4,096 units: 524,288 units in a step, 4 rows on each of 32 GPUs
PATCH_SIZE = 4  # at 25 Hz
LST_HOURS, LST_FRAME_RATE = 164_783, 25.0
LST_VOCAB = Vocab(num_text=32_000, num_speech=501)
STEPS_1B, STEPS_7B, ROWS_7B = 200_000, 25_000, 1024  # 4.2M units in a step of the 7B
UNITS_PER_PARAMETER = 30  # compute-optimal: 20 text tokens per parameter and half as many interleaved ones

# The interleaving paper (spec synthetic-interleaved 6); batch and warm-up are choices.
INTERLEAVED_ROW = 8192
INTERLEAVED_SHARE, SPOKEN_SHARE = 0.605, 0.62  # of all tokens; of the interleaved ones
HOURS_PER_TOKEN = 700_000 / 1e12
TOKENIZER_HOURS = 2 * 4 / 3  # hours through the tokenizer's training per hour of unsupervised speech


def _train(steps: int, **keys: object) -> TrainConfig:
    """What all of them have in common."""
    common = TrainConfig(
        steps=steps,
        lr=4e-4,
        warmup_steps=min(2000, steps),
        min_lr_ratio=0.01,
        dtype="bfloat16",
        compile=True,
        recompute="selective",
        shard="full",
        checkpoint_every=1000,
        checkpoint_async=True,
    )
    return replace(common, **keys)  # type: ignore[arg-type]


def _lst(size: str, model: PlainLMConfig | LatentLMConfig) -> PaperRun:
    """A rung of the ladder. The plain model of a size takes the same steps over the same number of units as its LST."""
    latent = isinstance(model, LatentLMConfig)
    rows = ROWS_7B if size == "7B" else ROWS
    steps = {"1.4B": STEPS_1B, "7B": STEPS_7B}.get(size) or round(
        UNITS_PER_PARAMETER * _parameters(size) / (ROWS * ROW_UNITS)
    )
    return PaperRun(
        about=f"{'LST' if latent else 'token-level baseline'} of the {size} rung, speech and text 1 : 2 by tokens",
        recipe=LMRecipe(
            model=model,
            patcher=PatcherConfig(kind="curriculum" if latent else "none", patch_size=PATCH_SIZE),
            weights=dict(MIXTURES["lst_paper"]),
            pack=PackConfig(rows=rows, units_per_row=ROW_UNITS, tokens_per_row=ROW_TOKENS if latent else ROW_UNITS),
            opening_marker="on",
            train=_train(steps, lr=2e-4 if size == "7B" else 4e-4),
        ),
        vocab_size=LST_VOCAB.size,
        data=DataPlan(hours=LST_HOURS, frame_rate=LST_FRAME_RATE, word_times=True),
    )


def _parameters(size: str) -> float:
    """The paper's own name of a rung as a number."""
    return float(size[:-1]) * (1e6 if size.endswith("M") else 1e9)


def _interleaved(about: str, llama: LlamaConfig, vocab_size: int, tokens: float, rows: int) -> PaperRun:
    steps = round(tokens / (rows * INTERLEAVED_ROW))
    return PaperRun(
        about=about,
        recipe=LMRecipe(
            model=PlainLMConfig(vocab_size=0, llama=llama),
            patcher=PatcherConfig(kind="none"),
            weights=dict(MIXTURES["interleaved_paper"]),
            pack=PackConfig(rows=rows, units_per_row=INTERLEAVED_ROW, tokens_per_row=INTERLEAVED_ROW),
            train=_train(steps, lr=6e-5, schedule="linear", min_lr_ratio=0.1, warmup_steps=round(0.01 * steps)),
        ),
        vocab_size=vocab_size,
        data=DataPlan(
            hours=HOURS_PER_TOKEN * tokens,
            frame_rate=12.5,
            tokenizer_hours=TOKENIZER_HOURS * HOURS_PER_TOKEN * tokens,
            interleaved_tokens=INTERLEAVED_SHARE * tokens,
            spoken_tokens=INTERLEAVED_SHARE * SPOKEN_SHARE * tokens,
        ),
    )


def _named(family: str, size: str) -> str:
    return f"{family}_{size.lower().replace('.', '_')}"


RECIPES: dict[str, PaperRun] = {
    **{_named("lst", size): _lst(size, ladder.latent(size)) for size in ladder.SIZES},
    **{_named("baseline", size): _lst(size, ladder.plain(size)) for size in ladder.SIZES},
    "interleaved_1_5b": _interleaved(
        "the size of the paper's ablations, whose shape and budget are unknown: a tenth of the 9B's tokens (choice)",
        LlamaConfig(width=1536, num_layers=28, num_heads=12, num_kv_heads=2, ffn_width=6656),
        vocab_size=Vocab(num_text=150_000, num_speech=16_384).size,
        tokens=1e11,
        rows=128,
    ),
    "interleaved_9b": _interleaved(
        "1T tokens; the paper starts from GLM-4-9B-Base",
        LlamaConfig(width=4096, num_layers=40, num_heads=32, num_kv_heads=2, ffn_width=13_696),
        vocab_size=168_960,
        tokens=1e12,
        rows=512,
    ),
}
