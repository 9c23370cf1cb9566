"""The speech tokenizer at the paper's size and at sizes that a single GPU trains.

None of them has been run here. The paper reports WER 2.10 / 4.90 on LibriSpeech clean / other for its 12.5 Hz tokenizer
(spec synthetic-interleaved 2.7).
Trap: a batch is bounded by seconds, not counted in clips. The paper's 4,096 clips are `RANKS * accumulate * batch_seconds`
seconds at `CLIP_S` each; another number of GPUs needs another `accumulate`.
"""

from dataclasses import replace

from speechquilt.stages.cost import CLIP_S, PaperRun
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.tokenizer.whisper_sizes import preset
from speechquilt.train.trainer import TrainConfig

# Of the report (spec 1, 2.5).
PSEUDO_HOURS = 700_000
RATIO = (1, 3)  # supervised : pseudo-labelled, by recordings
EPOCHS = 2
BATCH_CLIPS = 4096
PAPER_HOURS = EPOCHS * PSEUDO_HOURS * sum(RATIO) / RATIO[1]  # of audio in training, at equal lengths
PAPER_STEPS = round(PAPER_HOURS * 3600 / CLIP_S / BATCH_CLIPS)
PAPER_RANKS = 16  # weights, gradients and moments of 1.6 B parameters fit on each; fewer ranks add gradients less often
PAPER_BATCH_S = 320.0

LIBRISPEECH_HOURS = 960
ONE_GPU_EPOCHS = 10
ONE_GPU_BATCH_S = 640.0
ONE_GPU_ACCUMULATE = 4
ONE_GPU_STEPS = round(ONE_GPU_EPOCHS * LIBRISPEECH_HOURS * 3600 / (ONE_GPU_BATCH_S * ONE_GPU_ACCUMULATE))


def _train(steps: int, **keys: object) -> TrainConfig:
    """What both have in common: the schedule that spec 1, 2.5 chooses."""
    common = TrainConfig(
        steps=steps,
        lr=1e-5,
        warmup_steps=round(0.02 * steps),
        min_lr_ratio=0.1,
        beta1=0.9,
        beta2=0.98,
        weight_decay=0.01,
        clip=1.0,
        dtype="bfloat16",
        checkpoint_every=1000,
        checkpoint_async=True,
    )
    return replace(common, **keys)  # type: ignore[arg-type]


LARGE = TokenizerRecipe(
    model=preset("large-v3", 12.5),
    train=_train(PAPER_STEPS, accumulate=round(BATCH_CLIPS * CLIP_S / PAPER_BATCH_S / PAPER_RANKS)),
    batch_seconds=PAPER_BATCH_S,
    gain_db=0.0,
    sorted_epochs=0,
    threads=8,
    evaluate_every=5000,
)
"""The paper's: --start FOLDER of whisper-large-v3, a Mix at RATIO. On `PAPER_RANKS` GPUs."""


def one_gpu(size: str) -> TokenizerRecipe:
    """--start FOLDER of the Whisper of this size, LibriSpeech's 960 hours ten times. The higher lr is a choice for a smaller
    model and batch."""
    return TokenizerRecipe(
        model=preset(size, 12.5),
        train=_train(ONE_GPU_STEPS, lr=5e-5, accumulate=ONE_GPU_ACCUMULATE),
        batch_seconds=ONE_GPU_BATCH_S,
        gain_db=3.0,
        sorted_epochs=0,
        threads=8,
        evaluate_every=1000,
    )


RECIPES: dict[str, PaperRun] = {
    **{
        f"tokenizer_{size}": PaperRun(
            about=f"a tokenizer from Whisper {size}: LibriSpeech's 960 hours ten times, on one GPU",
            recipe=one_gpu(size),
        )
        for size in ("tiny", "base", "small", "medium")
    },
    "tokenizer_large": PaperRun(
        about="the paper's tokenizer: 2 epochs of 933,000 hours from whisper-large-v3", recipe=LARGE, ranks=PAPER_RANKS
    ),
}
