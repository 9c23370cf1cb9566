"""Stage 2: train the speech tokenizer as an ASR model and measure it on held-out sentences.

Cost of the default: about 4 minutes on two cores; expected word error rate: docs/results.md.
Trap: what is measured at the end is the *tokens*: held-out audio is encoded to ids, and the ids alone are read back.
What is measured on the way (`held_out.json`) is the ASR model as it stands, which has no codebook yet during the VQ
warm-up.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.feed.duration_batches import bucket
from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.data.sources.speech_corpora import Mix, SpeechCorpus
from speechquilt.evals.measures import Measure, Promise, at_least, at_most, is_true
from speechquilt.evals.wer import cer, wer
from speechquilt.protocols import Objective
from speechquilt.stages.encode import encode_all
from speechquilt.stages.first_codebook import first_codebook
from speechquilt.stages.held_out import note, stops
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.tokenizer.supervised import Head, SupervisedTokenizer, SupervisedTokenizerConfig
from speechquilt.tokenizer.whisper import Positions, whisper_start
from speechquilt.train import checkpoint, distributed
from speechquilt.train.codebook_watch import CodebookWatch
from speechquilt.train.objectives.asr import asr_objective
from speechquilt.train.spec_augment import SpecAugmentConfig
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.train.voice_augment import VoiceAugmentConfig
from speechquilt.types import Utterance

HELD_OUT_BATCH_S = 60.0  # audio that is transcribed at once, padding included
STREAM_CHUNKS = (1, 37, 160, 1111, 5000)  # samples per call when streaming is compared with offline, in turn
FIRST = "first"  # folder of the run without the codebook, inside the tokenizer's
STREAMED = 20  # held-out utterances that are streamed
FROM_WHISPER = (  # what a Whisper folder decides, whatever the recipe's model says
    "num_mels", "width", "num_heads", "ffn_width", "decoder_layers", "text_vocab_size", "layers_above", "decoder_prompt",
    "decoder_end", "max_text_ids", "positions_out",
)  # fmt: skip

MEASURES = (
    Measure(
        key="tokenizer.wer", kind="rate", meaning="word error rate of the tokenizer's ASR head on held-out sentences",
        promise=Promise(name="Tokenizer: word error rate of held-out sentences", bound=at_most(0.05)),
    ),
    Measure(key="tokenizer.cer", kind="rate", meaning="character error rate of the same readings"),
    Measure(key="tokenizer.wer_n", kind="count", meaning="held-out sentences behind tokenizer.wer"),
    Measure(key="tokenizer.wer_attention", kind="rate", meaning="the same tokens read by the attention decoder, whichever head tokenizer.wer is read by"),
    Measure(
        key="tokenizer.codebook_used", kind="share", meaning="share of the codebook seen on held-out audio",
        promise=Promise(name="Tokenizer: codebook in use", bound=at_least(0.25)),
    ),
    Measure(key="tokenizer.codebook_size", kind="count", meaning="entries of the codebook"),
    Measure(key="tokenizer.perplexity", kind="amount", meaning="perplexity of the code histogram on held-out audio"),
    Measure(key="tokenizer.bits_per_s", kind="amount", unit="bit/s", meaning="entropy of that histogram times the frame rate"),
    Measure(key="tokenizer.frame_rate", kind="amount", unit="Hz", meaning="speech tokens per second"),
    Measure(key="tokenizer.lookahead_s", kind="amount", unit="s", meaning="how far past a token's end the audio can still change it"),
    Measure(
        key="tokenizer.streaming_equals_offline", kind="flag", meaning="streamed in chunks, every token is the offline one",
        promise=Promise(name="Tokenizer: streaming gives the same tokens", bound=is_true()),
    ),
    Measure(key="tokenizer.left_out", kind="count", meaning="recordings left out of training: broken, too long, or with too long a text"),
    Measure(key="tokenizer.steps", kind="count", meaning="training steps of the tokenizer"),
    Measure(key="tokenizer.parameters", kind="count", meaning="parameters of the tokenizer"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """How a speech tokenizer is trained."""

    model: SupervisedTokenizerConfig
    """Sizes of the network and the codebook; text_vocab_size is the most text ids, fewer where the text needs fewer."""
    train: TrainConfig
    """The run: its steps, learning rate, devices and checkpoints."""
    first: TrainConfig | None = None
    """A run before it without the codebook, which k-means then makes from what the encoder says of the training audio;
    its seed should be another one. None: one run, whose codebook starts as model says."""
    vectors_per_code: int = 8
    """Vectors of training audio for each code of that k-means; fewer than 4 leave codes that stand for one sound."""
    kmeans_passes: int = 5
    """Times that k-means assigns all vectors to the codes, at least 1."""
    lower_lr: float = 1.0
    """Learning rate below the codebook as a share of train's. An encoder that learns as fast as the rest runs away from
    its codes (docs/decisions/0021-codebook.md)."""
    batch_seconds: float = 60.0
    """Most seconds of audio in a batch of one rank, padding included; longer recordings are left out."""
    gain_db: float = 3.0
    """Each recording is made louder or softer by up to this many decibels, at random; 0 leaves it as it is."""
    sorted_epochs: int = 1
    """The first so many epochs go from short to long recordings, on which CTC finds its alignments sooner."""
    augment: SpecAugmentConfig | None = None
    """SpecAugment: hide bands of time and frequency in training; None, as in the paper, hides nothing."""
    voices: VoiceAugmentConfig | None = None
    """Change the voice of each training recording: another vocal tract, another microphone, noise. None: as recorded."""
    latest_s: float = 0.0
    """Each batch begins up to so many seconds into its window, at random, as far as it fits. 0: always at the window's
    start, so that reader and codes learn at which time of a recording something is said."""
    threads: int = 0
    """Threads that decode audio ahead of the training step; 0 decodes in between. The batches are the same."""
    evaluate_every: int = 0
    """Steps between measurements of WER and CER on held-out speech, written to held_out.json; each costs a
    checkpoint. 0 measures at the end only.
    """
    evaluate_recordings: int = 64
    """Most held-out recordings, evenly spread, of a measurement on the way; 0 takes all, as the measurement at the end
    does. More: steadier rates, and more time in which nothing is trained.
    """
    start: str = ""
    """Hugging Face folder, or hub:OWNER/NAME, of a Whisper whose weights, sizes and text tokenizer the model takes; the bottleneck and
    everything of the codebook stay those of model. "" starts from random weights.
    """
    language: str | None = "en"
    """Language in the prompt of that Whisper, such as en; None for its English-only checkpoints."""
    positions: Positions = "out"
    """Whisper's position table at the bottleneck: "out" of the vectors and back behind the codebook, "kept" in them, or
    "twice" as in the paper, which undoes what Whisper has learnt."""

    def __post_init__(self) -> None:
        for key in ("threads", "evaluate_every", "evaluate_recordings", "latest_s"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")
        for key in ("vectors_per_code", "kmeans_passes"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.first and self.model.vq_warmup_updates:
            raise ValueError(
                f"first and model.vq_warmup_updates={self.model.vq_warmup_updates} both begin without a codebook; set the latter "
                "to 0"
            )


def train_tokenizer(
    recipe: TokenizerRecipe,
    text_tokenizer: TextTokenizer | None,
    train: Sequence[Utterance] | SpeechCorpus | Mix,
    held_out: Sequence[Utterance],
    folder: Path,
) -> dict[str, Any]:
    """Train, save to `folder`, return flat results (`tokenizer.*`).

    `text_tokenizer`: what the ASR heads spell with; a recipe with a `start` takes Whisper's instead. Under torchrun every rank
    gets the same `train`, and rank 0 writes.
    """
    model = new_model(recipe, text_tokenizer)
    if recipe.first and checkpoint.latest(folder) is None:
        model = run_without_codebook(recipe, recipe.first, model, train, folder / FIRST)
    loader = new_loader(recipe, model, train)
    if loader.rejects and distributed.rank() == 0:
        print(f"  {len(loader.rejects)} recordings left out: {loader.reject_summary()}")
    objective = objective_of(recipe)
    settings = replace(recipe.train, lr_scale=lower_rates(model, recipe.lower_lr) | recipe.train.lr_scale)
    sample = evenly(held_out, recipe.evaluate_recordings or len(held_out))
    trainer = Trainer(settings, model, objective, loader, folder, name="tokenizer", watch=CodebookWatch())
    try:
        for step in stops(recipe.evaluate_every, recipe.train.steps, folder):
            done = trainer.train(stop_after=step)
            if recipe.evaluate_every:
                note(folder, {"step": done.steps, **held_out_rates(model, sample)})
    finally:
        loader.close()
    if distributed.world_size() > 1:  # its own copy may be a shard of the model
        model = new_model(recipe, text_tokenizer)
        checkpoint.load_model(folder, model)
    model.eval().to("cpu")
    if distributed.rank() == 0:
        model.save(folder)
    return {
        "tokenizer.steps": recipe.train.steps,
        "tokenizer.parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer.left_out": len(loader.rejects),
        **measure_tokenizer(model, held_out),
    }


def run_without_codebook(
    recipe: TokenizerRecipe,
    settings: TrainConfig,
    model: SupervisedTokenizer,
    train: Sequence[Utterance] | SpeechCorpus | Mix,
    folder: Path,
) -> SupervisedTokenizer:
    """Train with the bottleneck open, then put a codebook of k-means into it. Goes on from where it stopped."""
    model.quantizer.close()
    loader = new_loader(replace(recipe, train=settings), model, train)
    try:
        Trainer(settings, model, objective_of(recipe), loader, folder, name="no codebook yet").train()
        if distributed.world_size() > 1:  # its own copy may be a shard of the model
            model = new_model(recipe, model.text_tokenizer).to(model.device)
            checkpoint.load_model(folder, model)
        wanted = recipe.vectors_per_code * model.config.codebook_size
        codebook = first_codebook(
            model, loader, folder, vectors=wanted, passes=recipe.kmeans_passes, seed=settings.seed
        )
    finally:
        loader.close()
    model.quantizer.open(codebook.codes_KD, codebook.metric_DE)
    return model


def objective_of(recipe: TokenizerRecipe) -> Objective:
    """Recognition, with what the recipe changes about its recordings: voices first, so that what is hidden stays hidden."""
    augments = [config.build() for config in (recipe.voices, recipe.augment) if config is not None]
    return partial(asr_objective, augments=augments, latest_s=recipe.latest_s)


def lower_rates(model: SupervisedTokenizer, share: float) -> dict[str, float]:
    """The share for all parameters below the codebook, by the beginnings of their names."""
    if share == 1.0:
        return {}
    below = [f"encoder.layers.{i}." for i in range(model.config.layers_below)]
    return dict.fromkeys(("encoder.conv", *below), share)


def new_model(recipe: TokenizerRecipe, text_tokenizer: TextTokenizer | None) -> SupervisedTokenizer:
    """Random weights drawn from the model's seed, or those of the recipe's Whisper, with an empty codebook."""
    if recipe.start:
        fields = {key: value for key, value in asdict(recipe.model).items() if key not in FROM_WHISPER}
        return whisper_start(Path(recipe.start), language=recipe.language, positions=recipe.positions, **fields)
    if text_tokenizer is None:
        raise ValueError("a tokenizer without start=WHISPER_FOLDER needs a text tokenizer for its ASR heads; train one")
    return replace(recipe.model, text_vocab_size=text_tokenizer.size).build(text_tokenizer)


def new_loader(
    recipe: TokenizerRecipe, model: SupervisedTokenizer, train: Sequence[Utterance] | SpeechCorpus | Mix
) -> UtteranceLoader:
    """This rank's batches, with targets that the model's heads can spell."""
    assert model.text_tokenizer is not None  # new_model gave it one
    return UtteranceLoader(
        train,
        model.text_tokenizer,
        batch_seconds=recipe.batch_seconds,
        seed=recipe.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        gain_db=recipe.gain_db,
        sorted_epochs=recipe.sorted_epochs,
        token_samples=model.token_samples,
        target_form=whisper_form if recipe.start else spoken_form,
        max_ids=model.config.max_text_ids,
        threads=recipe.threads,
    )


def whisper_form(text: str) -> str:
    """Whisper's text tokenizer has another first piece after a space than without one, and was trained with the space."""
    return " " + spoken_form(text)


def evenly(utterances: Sequence[Utterance], number: int) -> list[Utterance]:
    """So many of them, from the first to the last at like distances; all of them where there are no more."""
    number = min(number, len(utterances))
    return [utterances[i * len(utterances) // number] for i in range(number)]


def held_out_rates(model: SupervisedTokenizer, held_out: Sequence[Utterance]) -> dict[str, float]:
    """WER and CER of the ASR model, audio to text, by its `read_back_head`; by the attention head as `*_attention`."""
    texts = [u.text for u in held_out]
    rates: dict[str, float] = {}
    for name, heard in by_head(model, lambda head: transcribe(model, held_out, head)).items():
        rates |= {f"wer{name}": wer(zip(texts, heard)).rate, f"cer{name}": cer(zip(texts, heard)).rate}
    return rates


def by_head(model: SupervisedTokenizer, read: Callable[[Head], list[str]]) -> dict[str, list[str]]:
    """What the `read_back_head` reads, under "", and the attention head, under "_attention"; one head reads once."""
    usual = model.config.read_back_head
    first = read(usual)
    return {"": first, "_attention": first if usual == "attention" else read("attention")}


def transcribe(
    model: SupervisedTokenizer, utterances: Sequence[Utterance], head: Head | None = None, *, codebook: bool = True
) -> list[str]:
    """What the model hears, in order, on the model's device; `codebook` False: past its codebook."""
    listen = model.transcribe if codebook else model.transcribe_without_codebook
    waves = [audio.resample(u.audio, model.sample_rate).samples_S for u in utterances]
    length_N = np.array([len(samples_S) for samples_S in waves])
    texts = [""] * len(waves)
    limit = HELD_OUT_BATCH_S * model.sample_rate
    for rows_B in bucket(np.arange(len(waves)), length_N, limit, np.random.default_rng(0)):
        wav_BS = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(waves[i]) for i in rows_B], batch_first=True)
        num_samples_B = torch.from_numpy(length_N[rows_B])
        heard = listen(wav_BS.to(model.device), num_samples_B.to(model.device), head)
        for i, text in zip(rows_B.tolist(), heard):
            texts[i] = text
    return texts


def measure_tokenizer(model: SupervisedTokenizer, held_out: Sequence[Utterance]) -> dict[str, Any]:
    """Word error rate of the tokens, use of the codebook, and whether streaming gives the same tokens."""
    waves = [audio.resample(u.audio, model.sample_rate) for u in held_out]
    ids = encode_all(model, waves, what="held-out")
    counts_K = np.bincount(np.concatenate(ids), minlength=model.vocab_size)
    share_K = counts_K[counts_K > 0] / counts_K.sum()
    entropy = float(-(share_K * np.log(share_K)).sum())
    texts, read = [u.text for u in held_out], by_head(model, lambda head: model.read_back(ids, head))
    return {
        "tokenizer.wer": wer(zip(texts, read[""])).rate,
        "tokenizer.wer_n": len(held_out),
        "tokenizer.cer": cer(zip(texts, read[""])).rate,
        "tokenizer.wer_attention": wer(zip(texts, read["_attention"])).rate,
        "tokenizer.frame_rate": model.frame_rate,
        "tokenizer.lookahead_s": model.lookahead_s,
        "tokenizer.codebook_size": model.vocab_size,
        "tokenizer.codebook_used": float((counts_K > 0).mean()),
        "tokenizer.perplexity": float(np.exp(entropy)),
        "tokenizer.bits_per_s": float(entropy / np.log(2)) * model.frame_rate,
        "tokenizer.streaming_equals_offline": all(
            np.array_equal(stream(model, wave.samples_S, STREAM_CHUNKS[i % len(STREAM_CHUNKS)]), offline)
            for i, (wave, offline) in enumerate(zip(waves[:STREAMED], ids))
        ),
    }


def stream(model: SupervisedTokenizer, samples_S: np.ndarray, chunk: int) -> np.ndarray:
    """The ids of a waveform fed `chunk` samples at a time (never more than 2,000 calls, so the first part is longer)."""
    wav_S = torch.from_numpy(samples_S)
    head = max(0, len(wav_S) - 2000 * chunk)
    state = model.init_state()
    parts = []
    for piece_S in (wav_S[:head], *wav_S[head:].split(chunk)):
        ids_T, state = model.step(piece_S, state)
        parts.append(ids_T)
    ids_T, _ = model.step(wav_S[:0], state, final=True)
    return torch.cat([*parts, ids_T]).numpy()
