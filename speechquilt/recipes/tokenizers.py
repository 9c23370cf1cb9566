"""The speech tokenizer at the paper's size and at one that a single GPU trains, with what they cost by arithmetic; and the toy's.

Place in the pipeline: layer 4, starting points for `tokenizer_corpora`; override anything with key=value.
Cost and expected result: neither has been run here. `cost` counts FLOPs from the sizes; what the source does not say (clip
length, text ids per second, the share of the peak that a GPU reaches) is an argument with a stated assumption. The paper reports WER
2.10 / 4.90 on LibriSpeech clean / other for its 12.5 Hz tokenizer (spec 1, 2.7).
Trap: a batch is bounded by seconds, not counted in clips. The paper's 4,096 clips are `RANKS * accumulate * batch_seconds`
seconds at `CLIP_S` each; another number of GPUs needs another `accumulate`.
"""

from dataclasses import dataclass, replace

from speechquilt.audio import FRAME_RATE
from speechquilt.recipes import defaults
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.tokenizer.encoder import EncoderSizes
from speechquilt.tokenizer.supervised import SupervisedTokenizerConfig
from speechquilt.tokenizer.whisper_sizes import preset
from speechquilt.train.trainer import TrainConfig

# Of the report (spec 1, 2.5).
PSEUDO_HOURS = 700_000
RATIO = (1, 3)  # supervised : pseudo-labelled, by recordings
EPOCHS = 2
BATCH_CLIPS = 4096
# Assumptions of ours, where the source is silent.
CLIP_S = 10.0
TEXT_IDS_PER_S = 4.0
MFU = 0.4  # share of the peak that training reaches
H100_FLOPS = 989e12  # dense bfloat16, data sheet

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
    model=replace(preset("large-v3", 12.5), read_back_head="attention"),
    train=_train(PAPER_STEPS, accumulate=round(BATCH_CLIPS * CLIP_S / PAPER_BATCH_S / PAPER_RANKS)),
    batch_seconds=PAPER_BATCH_S,
    gain_db=0.0,
    sorted_epochs=0,
    threads=8,
    evaluate_every=5000,
)
"""The paper's: start=FOLDER of whisper-large-v3, a Mix at RATIO. On `PAPER_RANKS` GPUs."""


def one_gpu(size: str) -> TokenizerRecipe:
    """start=FOLDER of the Whisper of this size, LibriSpeech's 960 hours ten times. The higher lr is a choice for a smaller
    model and batch."""
    return TokenizerRecipe(
        model=replace(preset(size, 12.5), read_back_head="attention"),
        train=_train(ONE_GPU_STEPS, lr=5e-5, accumulate=ONE_GPU_ACCUMULATE),
        batch_seconds=ONE_GPU_BATCH_S,
        gain_db=3.0,
        sorted_epochs=0,
        threads=8,
        evaluate_every=1000,
    )


DEFAULT = "toy"
RECIPES = {
    DEFAULT: defaults.TOKENIZER,
    **{size: one_gpu(size) for size in ("tiny", "base", "small", "medium")},
    "large": LARGE,
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Audio that goes through training, its FLOPs, and the time of one GPU for it."""

    audio_hours: float
    flops: float
    gpu_hours: float


def cost(
    recipe: TokenizerRecipe,
    *,
    ranks: int,
    mfu: float = MFU,
    peak_flops: float = H100_FLOPS,
    clip_s: float = CLIP_S,
    text_ids_per_s: float = TEXT_IDS_PER_S,
) -> Cost:
    """An estimate: steps x audio per step x FLOPs per second of audio / (peak x mfu). Full batches are assumed."""
    train = recipe.train
    seconds = train.steps * train.accumulate * ranks * recipe.batch_seconds
    flops = seconds * training_flops_per_s(recipe.model, clip_s=clip_s, text_ids_per_s=text_ids_per_s)
    return Cost(audio_hours=seconds / 3600, flops=flops, gpu_hours=flops / (peak_flops * mfu) / 3600)


def training_flops_per_s(model: SupervisedTokenizerConfig, *, clip_s: float, text_ids_per_s: float) -> float:
    """FLOPs of one second of audio in training: matrix products forward, and twice that backward; the search for the
    nearest code goes forward alone. Clips of `clip_s` seconds, at most a window, attend densely."""
    frames_per_s = FRAME_RATE / 2
    tokens_per_s = frames_per_s / model.pooling
    clip_s = min(clip_s, model.max_frames / frames_per_s)
    width, texts = model.width, model.text_vocab_size + 1
    conv1, conv2 = 6 * width * model.num_mels * FRAME_RATE, 6 * width**2 * frames_per_s
    below = model.layers_below * frames_per_s * _layer(model, clip_s * frames_per_s)
    above = model.layers_above * tokens_per_s * _layer(model, clip_s * tokens_per_s)
    ctc = 2 * width * texts * tokens_per_s
    text_length = clip_s * text_ids_per_s
    per_id = _layer(model, text_length) + 4 * width**2 + 4 * width * clip_s * tokens_per_s
    decoder = model.decoder_layers * (text_ids_per_s * per_id + tokens_per_s * 4 * width**2)
    decoder += text_ids_per_s * 2 * width * texts
    search = 2 * width * model.codebook_size * tokens_per_s
    return 2 * conv1 + 3 * (conv2 + below + above + ctc + decoder) + search  # features need no gradient


def _layer(sizes: EncoderSizes, length: float) -> float:
    """FLOPs of one position of a self-attention block, forward: projections, feed-forward, attention over `length`."""
    return 8 * sizes.width**2 + 4 * sizes.width * sizes.ffn_width + 4 * sizes.width * length
