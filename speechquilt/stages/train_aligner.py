"""Train the aligner's own encoder on transcribed speech, measure its word times, and align recordings that have none.

`load_aligner` opens any folder that can align. Cost of `micro_world_aligner`: about a minute and a half on one core.
Expected result: docs/decisions/0013-alignment.md.
Trap: CTC training needs no word times, but the shift that puts its spikes back onto word boundaries is measured on
recordings that have them. Without any, the shift is 0 and starts are about two frames late.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt import audio
from speechquilt.aligner import BoundaryShift, CTCAligner, Wav2Vec2Emitter
from speechquilt.config import load, to_dict
from speechquilt.data.feed.utterances import UtteranceLoader
from speechquilt.data.sources.micro_world import MicroWorldConfig
from speechquilt.evals.measures import Measure
from speechquilt.files import write_json
from speechquilt.protocols import Aligner
from speechquilt.stages.corpus import join, speak
from speechquilt.text import spoken_form
from speechquilt.tokenizer.emitters import FRAME_SAMPLES, CharacterCTC, CharacterCTCConfig, TokenizerEmitter
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import checkpoint, distributed
from speechquilt.train.objectives.asr import ctc_objective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.tts.espeak import EspeakTTSConfig
from speechquilt.types import Reject, Utterance

CALIBRATED = 200  # training recordings with known word times that the shift is measured on
GOAL_S = 0.040  # spec 2, section 4: boundaries off by 20-40 ms cost at most about 1 %
SHIFT_FILE, RESULTS_FILE = "shift.json", "results.json"
FRAME_S = FRAME_SAMPLES / audio.SAMPLE_RATE
FITTING, LONGEST_S = 0.9, 30.0  # share of one's own recordings that the window holds, and its longest in seconds

MEASURES = (
    Measure(key="aligner.steps", kind="count", meaning="training steps of the aligner"),
    Measure(key="aligner.parameters", kind="count", meaning="parameters of the aligner"),
    Measure(key="aligner.start_shift_s", kind="difference", unit="s", meaning="added to every word's start"),
    Measure(key="aligner.end_shift_s", kind="difference", unit="s", meaning="added to every word's end"),
    Measure(
        key="aligner.boundary_error_median_s", kind="amount", unit="s", meaning="median distance of word boundaries"
    ),
    Measure(key="aligner.boundary_error_p90_s", kind="amount", unit="s", meaning="90th percentile of the same"),
    Measure(key="aligner.boundaries_within_goal", kind="share", meaning=f"share of them within {GOAL_S * 1000:.0f} ms"),
    Measure(key="aligner.boundaries_n", kind="count", meaning="boundaries behind these figures"),
)


@dataclass(frozen=True, kw_only=True)
class AlignerRecipe:
    """How an aligner is trained. Recordings longer than the model's window are left out."""

    model: CharacterCTCConfig = CharacterCTCConfig(alphabet="")
    """Sizes of the network; its alphabet is filled in from the training texts."""
    train: TrainConfig = TrainConfig(
        steps=400,
        lr=2e-3,
        warmup_steps=50,
        min_lr_ratio=0.05,
        beta2=0.98,
        weight_decay=0.01,
        log_every=20,
        checkpoint_every=200,
        num_threads=1,
    )
    """The run: its steps, learning rate and checkpoints."""
    batch_seconds: float = 16.0
    """Most seconds of audio in a batch, padding included; never less than the model's window."""
    gain_db: float = 3.0
    """Each recording is made louder or softer by up to this many decibels, at random; 0 leaves it as it is."""
    sorted_epochs: int = 1
    """The first so many epochs go from short to long recordings, on which alignments are found sooner."""
    fit_window: bool = False
    """Let the recordings decide model.max_frames, so that nine in ten are heard whole, up to 30 s. A window much
    longer than what it was trained on would be deaf to places that it has never seen.
    """


OWN_ALIGNER = AlignerRecipe(fit_window=True)
"""For recordings whose lengths nobody knows beforehand."""


@dataclass(frozen=True, kw_only=True)
class MicroWorldAlignerConfig:
    """An aligner for the micro-world, trained on its sentences as espeak-ng speaks them."""

    run_dir: str = "runs/aligner"
    """Folder that holds the run."""
    world: MicroWorldConfig = MicroWorldConfig()
    """Which micro-world."""
    voices: EspeakTTSConfig = EspeakTTSConfig()
    """Who speaks, and how."""
    sentences: int = 2000
    """Sentences to train on."""
    max_joined: int = 5
    """Most sentences in one recording, held-out ones included: in a single short sentence, words spread evenly are
    not far off.
    """
    held_out: int = 200
    """Sentences to measure on."""
    recipe: AlignerRecipe = field(default_factory=AlignerRecipe)
    """How the aligner is trained."""


def micro_world_aligner(config: MicroWorldAlignerConfig = MicroWorldAlignerConfig()) -> dict[str, Any]:
    """Speak, train into `run_dir`, return the results on held-out sentences."""
    world, speaker = config.world.build(), config.voices.build()
    train = speak(speaker, join(world.sentences(config.sentences), config.max_joined, seed=0), "speak sentences")
    held_out = speak(
        speaker, join(world.held_out_sentences(config.held_out), config.max_joined, seed=1), "speak held-out"
    )
    return train_aligner(config.recipe, train, held_out, Path(config.run_dir))


def train_aligner(
    recipe: AlignerRecipe, train: Sequence[Utterance], held_out: Sequence[Utterance], folder: Path
) -> dict[str, Any]:
    """Train, save to `folder`, return flat results (`aligner.*`). Word times are used for the shift and for measuring only.

    Under torchrun every rank gets the same recordings, and rank 0 writes. Raises ValueError when nothing can be trained on.
    """
    alphabet = "".join(sorted(set("".join(spoken_form(u.text) for u in train)) - {" "}))
    config = replace(recipe.model, alphabet=alphabet)
    if recipe.fit_window:
        config = with_fitting_window(config, [u.duration_s for u in train])
    model = config.build()
    window_s = config.max_frames * FRAME_S
    fitting = fitting_window(train, window_s)
    loader = UtteranceLoader(
        fitting,
        model.text_tokenizer,
        batch_seconds=max(recipe.batch_seconds, window_s),
        seed=recipe.train.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        gain_db=recipe.gain_db,
        sorted_epochs=recipe.sorted_epochs,
        token_samples=FRAME_SAMPLES,
    )
    if loader.rejects and distributed.rank() == 0:
        print(f"  {len(loader.rejects)} recordings left out: {loader.reject_summary()}")
    Trainer(recipe.train, model, ctc_objective, loader, folder, name="aligner").train()
    if distributed.world_size() > 1:  # its own copy may be a shard of the model
        model = config.build()
        checkpoint.load_model(folder, model)
    model.eval().to("cpu")
    timed = [u for u in fitting if u.alignment][:CALIBRATED]
    shift = measure_shift(CTCAligner(model), timed)
    if distributed.rank() == 0:
        model.save(folder)
        write_json(folder / SHIFT_FILE, to_dict(shift))
    return {
        "aligner.steps": recipe.train.steps,
        "aligner.parameters": sum(p.numel() for p in model.parameters()),
        "aligner.start_shift_s": shift.start_s,
        "aligner.end_shift_s": shift.end_s,
        **measure_aligner(CTCAligner(model, shift), held_out),
    }


def with_fitting_window(config: CharacterCTCConfig, seconds: Sequence[float]) -> CharacterCTCConfig:
    """A window in which `FITTING` of recordings of these lengths have room, of at most `LONGEST_S`; a quarter of it at most
    is context."""
    wanted_s = min(LONGEST_S, float(np.quantile(seconds, FITTING, method="higher")))
    max_frames = math.ceil(wanted_s / FRAME_S)
    return replace(config, max_frames=max_frames, context_frames=min(config.context_frames, max_frames // 4))


def fitting_window(utterances: Sequence[Utterance], window_s: float) -> list[Utterance]:
    """Those that the network can hear at once. Raises ValueError when none is short enough."""
    fitting = [u for u in utterances if u.duration_s <= window_s]
    if not fitting:
        raise ValueError(
            f"all {len(utterances)} recordings are longer than the window of {window_s:.1f} s; cut some of them into "
            "sentences, or raise recipe.model.max_frames (20 ms each)"
        )
    if len(fitting) < len(utterances) and distributed.rank() == 0:
        print(f"  {len(utterances) - len(fitting)} recordings longer than the window of {window_s:.1f} s left out")
    return fitting


def load_aligner(folder: str | Path, device: str = "cpu") -> CTCAligner:
    """An aligner from a run of `train_aligner`, a speech tokenizer's folder, or a Hugging Face Wav2Vec2ForCTC folder.

    Raises FileNotFoundError or ValueError naming the file that is wrong.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; give the folder of an aligner, a tokenizer or a Wav2Vec2ForCTC model"
        )
    keys = json.loads(path.read_text())
    shift = load(BoundaryShift, folder / SHIFT_FILE) if (folder / SHIFT_FILE).is_file() else BoundaryShift()
    if "model_type" in keys:
        return CTCAligner(Wav2Vec2Emitter(folder, device=device), shift)
    if "alphabet" in keys:
        return CTCAligner(CharacterCTC.load(folder).to(device), shift)
    return CTCAligner(TokenizerEmitter(SupervisedTokenizer.load(folder).to(device)), shift)


def align_utterances(aligner: Aligner, utterances: Iterable[Utterance]) -> tuple[list[Utterance], list[Reject]]:
    """Word times for recordings that have none; those that have keep theirs. What cannot be aligned is a reject."""
    aligned: list[Utterance] = []
    rejects: list[Reject] = []
    for utterance in utterances:
        if utterance.alignment:
            aligned.append(utterance)
            continue
        try:
            words = aligner.align(utterance.audio, utterance.text)
        except ValueError as error:
            rejects.append(Reject(id=utterance.id, reason=str(error)))
        else:
            aligned.append(replace(utterance, alignment=words))
    return aligned, rejects


def boundary_errors(aligner: Aligner, utterances: Sequence[Utterance]) -> np.ndarray:
    """Found minus known start and end of every word that was heard, `[N, 2]` in seconds. Words must be spelled alike."""
    errors: list[tuple[float, float]] = []
    for utterance in utterances:
        found = aligner.align(utterance.audio, utterance.text)
        if [w.text for w in found] != [w.text for w in utterance.alignment]:
            raise ValueError(f"{utterance.id}: its known words are not the words of its text; cannot compare times")
        errors += [
            (word.start_s - known.start_s, word.end_s - known.end_s)
            for word, known in zip(found, utterance.alignment)
            if word.score > 0
        ]
    return np.array(errors).reshape(-1, 2)


def measure_shift(aligner: CTCAligner, timed: Sequence[Utterance]) -> BoundaryShift:
    """The shift that brings the median start and end onto the known ones; none when no recording has word times."""
    errors_N2 = boundary_errors(CTCAligner(aligner.emitter), timed)
    if not len(errors_N2):
        return BoundaryShift()
    start_s, end_s = (-np.median(errors_N2, axis=0)).tolist()
    return BoundaryShift(start_s=start_s, end_s=end_s)


def measure_aligner(aligner: Aligner, timed: Sequence[Utterance]) -> dict[str, Any]:
    """How far starts and ends lie from the known ones, in seconds; {} when no recording has word times."""
    timed = [u for u in timed if u.alignment]
    errors_N = np.abs(boundary_errors(aligner, timed)).ravel()
    if not len(errors_N):
        return {}
    return {
        "aligner.boundary_error_median_s": float(np.median(errors_N)),
        "aligner.boundary_error_p90_s": float(np.quantile(errors_N, 0.9)),
        "aligner.boundaries_within_goal": float((errors_N <= GOAL_S).mean()),
        "aligner.boundaries_n": len(errors_N),
    }
