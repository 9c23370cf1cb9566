"""What a run of a recipe costs, by arithmetic: FLOPs from its sizes, tokens and hours from its data; nothing is trained.

Trap: a plan is as good as its throughputs. Each line says where its own comes from: "stated" by a publication, "assumed" by
us. None of them was measured by this project on such machines.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from speechquilt.audio import FRAME_RATE
from speechquilt.decoder.discriminators import (
    HOPS,
    PERIOD_KERNEL,
    PERIOD_STRIDE,
    WINDOW_KERNEL,
    WINDOW_LAYERS,
    WINDOW_STRIDE,
    DiscriminatorsConfig,
)
from speechquilt.decoder.matching import FlowDraws
from speechquilt.decoder.mel import MelConfig
from speechquilt.model.flops import BACKWARD, forward_flops, paper_row
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.stages.train_decoder import DecoderRecipe
from speechquilt.stages.train_lm import LMRecipe
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.stages.train_tokenizer import TokenizerRecipe
from speechquilt.stages.train_vocoder import VocoderRecipe
from speechquilt.tokenizer.encoder import EncoderSizes
from speechquilt.tokenizer.supervised import SupervisedTokenizer, SupervisedTokenizerConfig

BYTES_PER_PARAMETER = 16  # float32 weights, gradients and two moments
BYTES_PER_TOKEN = 2.5  # of a Parquet shard of ids, compressed (assumed)
CHECKPOINT_BYTES = 12  # per parameter: weights and moments
WHISPER_LARGE = 1.54e9  # parameters of the tokenizer that interleaved data needs first
CLIP_S = 10.0  # length of a training clip of the tokenizer (assumed)


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
class Machine:
    """So many GPUs of a kind, which reach the share `mfu` of their peak in training."""

    gpu: Gpu
    gpus: int
    mfu: float

    @property
    def flops(self) -> float:
        """Per GPU and second."""
        return self.gpu.peak * self.mfu


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


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """What has to be made before a language model trains: `hours` of speech to tokenize at `frame_rate` tokens per second,
    with `word_times` or without; hours through the training of the tokenizer; tokens that a text-to-token model speaks, in
    so many tokens of interleaved documents."""

    hours: float
    frame_rate: float
    word_times: bool = False
    tokenizer_hours: float = 0.0
    spoken_tokens: float = 0.0
    interleaved_tokens: float = 0.0

    def stages(self, machine: Machine) -> list[StagePlan]:
        found = [_tokenizing(self.hours, self.frame_rate)]
        if self.tokenizer_hours:
            found.insert(0, _whisper_training(self.tokenizer_hours, machine))
        if self.word_times:
            found.append(_aligning(self.hours, self.frame_rate))
        if self.spoken_tokens:
            found.append(_speaking(self.spoken_tokens, self.interleaved_tokens, machine))
        return found


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """A recipe with what training does not need and planning does: what it is, the GPUs it was made for, the vocabulary that
    will come with the shards, and the data."""

    about: str
    recipe: LMRecipe | TokenizerRecipe | TextToTokenRecipe | VocoderRecipe | DecoderRecipe
    ranks: int = 1
    vocab_size: int = 0
    data: DataPlan | None = None

    def stages(self, machine: Machine) -> list[StagePlan]:
        """All stages of the run, in order."""
        before = self.data.stages(machine) if self.data else []
        if isinstance(self.recipe, TokenizerRecipe):
            return [*before, tokenizer_training(self.recipe, self.ranks, machine)]
        if isinstance(self.recipe, TextToTokenRecipe):
            return [*before, speaker_training(self.recipe, self.vocab_size, machine)]
        if isinstance(self.recipe, VocoderRecipe):
            return [*before, vocoder_training(self.recipe, machine)]
        if isinstance(self.recipe, DecoderRecipe):
            return [*before, decoder_training(self.recipe, machine)]
        return [*before, lm_training(self.recipe, self.vocab_size, machine)]


def lm_training(recipe: LMRecipe, vocab_size: int, machine: Machine) -> StagePlan:
    """Pre-training from its FLOPs; one row per GPU at a time, weights sharded over all GPUs, blocks recomputed."""
    config = replace(recipe.model, vocab_size=vocab_size)
    pack, train = recipe.pack, recipe.train
    patch = 1 if isinstance(config, PlainLMConfig) else recipe.patcher.patch_size
    units = train.steps * train.accumulate * pack.rows * pack.units_per_row
    return _stack_training("pretrain", config, units=units, patch=patch, row_units=pack.units_per_row, machine=machine)


def speaker_training(recipe: TextToTokenRecipe, vocab_size: int, machine: Machine) -> StagePlan:
    """A text-to-token model, as a plain language model of its size over full rows."""
    config = PlainLMConfig(vocab_size=vocab_size, llama=recipe.llama)
    tokens = recipe.train.steps * recipe.train.accumulate * recipe.data.rows * recipe.data.row_tokens
    return _stack_training(
        "text_to_token", config, units=tokens, patch=1, row_units=recipe.data.row_tokens, machine=machine
    )


def tokenizer_training(recipe: TokenizerRecipe, ranks: int, machine: Machine) -> StagePlan:
    """The audio of a recipe made for `ranks`; weights, gradients and moments lie whole on every GPU."""
    seconds = audio_seconds(recipe, ranks)
    per_second = training_flops_per_s(recipe.model, clip_s=CLIP_S, text_ids_per_s=recipe.model.text_ids_per_s)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in SupervisedTokenizer(recipe.model).parameters())
    return StagePlan(
        name="tokenizer",
        amount=seconds,
        unit="seconds of audio",
        per_gpu_s=machine.flops / per_second,
        source=f"assumed: {machine.mfu:.0%} of peak, {per_second / 1e9:.1f} GFLOPs per second of audio, clips of "
        f"{CLIP_S:g} s; memory is that of {parameters / 1e9:.2f}B parameters alone, without activations",
        storage_gb=CHECKPOINT_BYTES * parameters / 1e9,
        memory_gib=BYTES_PER_PARAMETER * parameters / 2**30,
    )


def vocoder_training(recipe: VocoderRecipe, machine: Machine) -> StagePlan:
    """All its pieces, with discriminators once they have begun; weights, gradients and moments lie whole on every GPU."""
    rate, train = recipe.vocoder.mel.sample_rate, recipe.train
    alone, judged = (vocoder_flops(recipe, judged=judged) for judged in (False, True))
    share = recipe.gan.after / train.steps if recipe.gan else 1.0
    per_second = (share * alone + (1 - share) * judged) * rate / recipe.crops.samples
    with torch.device("meta"):
        parameters = sum(p.numel() for p in recipe.build().parameters())
    return StagePlan(
        name="vocoder",
        amount=train.steps * train.accumulate * recipe.crops.rows * recipe.crops.samples / rate,
        unit="seconds of audio",
        per_gpu_s=machine.flops / per_second,
        source=f"assumed: {machine.mfu:.0%} of peak, which narrow convolutions are far from; {per_second / 1e9:.1f} GFLOPs per "
        f"second of audio; memory is that of {parameters / 1e6:.0f}M parameters alone, without activations",
        storage_gb=CHECKPOINT_BYTES * parameters / 1e9,
        memory_gib=BYTES_PER_PARAMETER * parameters / 2**30,
    )


def decoder_training(recipe: DecoderRecipe, machine: Machine) -> StagePlan:
    """Both runs, all of whose pieces are counted as full; weights, gradients and moments lie whole on every GPU."""
    seconds = recipe.pieces.tokens / recipe.flow.token_rate
    per_second = decoder_flops(recipe) / seconds
    steps = sum(run.steps * run.accumulate for run in (recipe.first, recipe.train) if run)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in recipe.flow.build().parameters())
    return StagePlan(
        name="decoder",
        amount=steps * recipe.pieces.rows * seconds,
        unit="seconds of audio",
        per_gpu_s=machine.flops / per_second,
        source=f"assumed: {machine.mfu:.0%} of peak; {per_second / 1e9:.1f} GFLOPs per second of audio, counted by torch; memory is "
        f"that of {parameters / 1e6:.0f}M parameters alone, without activations",
        storage_gb=CHECKPOINT_BYTES * parameters / 1e9,
        memory_gib=BYTES_PER_PARAMETER * parameters / 2**30,
    )


def decoder_flops(recipe: DecoderRecipe) -> float:
    """FLOPs of one full piece in training: matrix products and convolutions of a forward pass, counted by torch without
    computing anything, and twice as many backwards."""
    config, tokens = recipe.flow, recipe.pieces.tokens
    frames = config.time.num_frames(tokens)
    with torch.device("meta"):
        model = config.build()
        mel_BMF = torch.zeros(1, config.mel.num_mels, frames)
        draws = FlowDraws(torch.zeros(1), mel_BMF, torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool))
        counts = torch.full((1,), tokens), torch.full((1,), frames), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, tokens, dtype=torch.long), counts[0], mel_BMF, counts[1], counts[2], None, draws)
    return (1 + BACKWARD) * float(counter.get_total_flops())


def vocoder_flops(recipe: VocoderRecipe, *, judged: bool) -> float:
    """FLOPs of one piece in training: convolutions and matrix products, not Fourier transforms.

    Discriminators hear the made sound once with a gradient to the sound alone, and it and the recorded sound once with a
    gradient to the weights, beyond which their first layers have none.
    """
    config, num_samples = recipe.vocoder, recipe.crops.samples
    frames = num_samples // config.mel.hop
    first = 2 * frames * config.mel.num_mels * config.kernel * config.width
    block = 2 * frames * config.width * (config.kernel + 2 * config.ffn_width)
    out = 2 * frames * config.width * (config.mel.fft_samples + 2)
    found = 2 * first + 3 * (config.num_layers * block + out) + _filters(config.mel, num_samples)
    found += 3 * sum(_filters(mel, num_samples) for mel in recipe.loss_mels)
    if judged and recipe.gan is not None:
        judges = recipe.gan.discriminators
        stacks = [_columns(judges, period, num_samples) for period in judges.periods]
        stacks += [_spectra(judges, window, num_samples) for window in judges.windows]
        found += sum(8 * sum(layers) - 2 * layers[0] for layers in stacks)
    return float(found)


def _filters(mel: MelConfig, num_samples: int) -> int:
    """Forward FLOPs of a mel of magnitudes."""
    return 2 * (num_samples // mel.hop) * (mel.fft_samples // 2 + 1) * mel.num_mels


def _columns(judges: DiscriminatorsConfig, period: int, num_samples: int) -> list[int]:
    """Forward FLOPs of each layer of a discriminator by period, for one row."""
    places, width, found = -(-num_samples // period), 1, []
    for i, next_ in enumerate(judges.period_channels):
        if i < len(judges.period_channels) - 1:
            places = -(-places // PERIOD_STRIDE)
        found.append(2 * places * period * PERIOD_KERNEL * width * next_)
        width = next_
    return [*found, 2 * places * period * 3 * width]


def _spectra(judges: DiscriminatorsConfig, window: int, num_samples: int) -> list[int]:
    """The same of one by window."""
    width, kernel = judges.window_channels, WINDOW_KERNEL[0] * WINDOW_KERNEL[1]
    frames, places = num_samples // (window // HOPS) + 1, window // 2 + 1
    found = [2 * frames * places * kernel * width]
    for _ in range(WINDOW_LAYERS - 2):
        places = -(-places // WINDOW_STRIDE[1])
        found.append(2 * frames * places * kernel * width**2)
    return [*found, 2 * frames * places * 9 * width**2, 2 * frames * places * 9 * width]


def audio_seconds(recipe: TokenizerRecipe, ranks: int) -> float:
    """Audio that goes through a tokenizer's training; full batches are assumed."""
    return recipe.train.steps * recipe.train.accumulate * ranks * recipe.batch_seconds


def _stack_training(
    name: str, config: PlainLMConfig | LatentLMConfig, *, units: float, patch: int, row_units: int, machine: Machine
) -> StagePlan:
    size = paper_row(config, patch, row_units)
    per_unit = (1 + BACKWARD) * sum(forward_flops(config, size).values()) / size.units
    parameters = _parameters(config)
    stack = config.llama if isinstance(config, PlainLMConfig) else config.global_
    kept = 2 * stack.width * stack.num_layers * row_units  # bfloat16 inputs of the blocks
    logits = 3 * 4 * config.vocab_size * size.tokens  # float32 logits, their gradient and the softmax
    memory = BYTES_PER_PARAMETER * parameters / machine.gpus + kept + logits + 2 * 3 * parameters / stack.num_layers
    return StagePlan(
        name=name,
        amount=units,
        unit="units",
        per_gpu_s=machine.flops / per_unit,
        source=f"assumed: {machine.mfu:.0%} of peak, {per_unit / 1e9:.2f} GFLOPs per unit, "
        f"{parameters / 1e9:.2f}B parameters",
        storage_gb=CHECKPOINT_BYTES * parameters / 1e9,
        memory_gib=memory / 2**30,
    )


def _tokenizing(hours: float, frame_rate: float) -> StagePlan:
    return StagePlan(
        name="tokenize",
        amount=hours,
        unit="hours of speech",
        per_gpu_s=220 / 3600,
        source="stated: 220 x real time of a comparable tokenizer on one RTX 3090",
        storage_gb=BYTES_PER_TOKEN * hours * 3600 * frame_rate / 1e9,
    )


def _aligning(hours: float, frame_rate: float) -> StagePlan:
    return StagePlan(
        name="align",
        amount=hours,
        unit="hours of speech",
        per_gpu_s=220 / 3600,
        source="assumed: an aligner as fast as a tokenizer",
        storage_gb=0.2 * hours * 3600 * frame_rate / 1e9,
    )


def _speaking(spoken_tokens: float, interleaved_tokens: float, machine: Machine) -> StagePlan:
    return StagePlan(
        name="interleave",
        amount=spoken_tokens,
        unit="speech tokens",
        per_gpu_s=25_000 * machine.gpu.peak / GPUS["h100"].peak,
        source="stated: 25k tokens/s of a 1.5B text-to-token model on one H800",
        storage_gb=BYTES_PER_TOKEN * interleaved_tokens / 1e9,
    )


def _whisper_training(hours: float, machine: Machine) -> StagePlan:
    per_second = 3 * 2 * WHISPER_LARGE * 1500 / 30  # 1,500 frames in 30 s
    return StagePlan(
        name="tokenizer",
        amount=hours * 3600,
        unit="seconds of audio",
        per_gpu_s=machine.flops / per_second,
        source=f"assumed: {machine.mfu:.0%} of peak; 2 epochs, supervised : pseudo-labelled 1 : 3",
        storage_gb=CHECKPOINT_BYTES * WHISPER_LARGE / 1e9,
    )


def _parameters(config: PlainLMConfig | LatentLMConfig) -> int:
    with torch.device("meta"):
        model = PlainLM(config) if isinstance(config, PlainLMConfig) else LatentLM(config)
    return sum(p.numel() for p in model.parameters())


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
    ctc = 2 * width * texts * tokens_per_s if model.ctc_weight else 0.0
    text_length = clip_s * text_ids_per_s
    per_id = _layer(model, text_length) + 4 * width**2 + 4 * width * clip_s * tokens_per_s
    decoder = model.decoder_layers * (text_ids_per_s * per_id + tokens_per_s * 4 * width**2)
    decoder += text_ids_per_s * 2 * width * texts
    search = 2 * width * model.codebook_size * tokens_per_s
    return 2 * conv1 + 3 * (conv2 + below + above + ctc + decoder) + search  # features need no gradient


def _layer(sizes: EncoderSizes, length: float) -> float:
    """FLOPs of one position of a self-attention block, forward: projections, feed-forward, attention over `length`."""
    return 8 * sizes.width**2 + 4 * sizes.width * sizes.ffn_width + 4 * sizes.width * length
