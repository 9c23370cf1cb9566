"""Sentences x voices -> a corpus of recordings on disk, each sentence spoken by a voice or two drawn at random.

Three folders of FLAC files with a `metadata.jsonl` beside them, word times included, as every reader of speech takes
them: `train`, `held_out` (other sentences, the same voices) and `unseen_voice` (the sentences of `held_out` in a voice
that is never trained on). Held-out sets come first, so they are whole however short the time was.
Trap: the split is by what is said, not by spelling, and a voice is left out with all its pitches and rates: the same
person in another key is not a new voice.
"""

import functools
import json
import math
import multiprocessing
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from speechquilt import audio, config
from speechquilt.files import make_folder, write_json
from speechquilt.stages.workers import end_with_parent
from speechquilt.text import spoken_form
from speechquilt.tts.voices import VoiceBank, VoiceBankConfig, VoiceName, faster
from speechquilt.types import Utterance

TRAIN, HELD_OUT, UNSEEN_VOICE = "train", "held_out", "unseen_voice"
METADATA, REJECTS, STATE = "metadata.jsonl", "rejects.jsonl", "corpus.json"
UNFINISHED = "unfinished"  # beside the sets, so that these can be read while others are spoken
SENTENCES_PER_TASK = 64  # a few seconds of work, which a kill costs
LOOK_EVERY_S = 1.0
VOICES = (  # more of Flite's than of espeak-ng's, which Whisper hears wrong two to three times as often
    "flite:slt",
    "flite:slt+p0.88r0.95",
    "flite:slt+p0.94r1.08",
    "flite:slt+p1.12r1.05",
    "flite:awb",
    "flite:awb+p0.90r1.08",
    "flite:awb+p1.08r1.04",
    "flite:awb+p1.16r0.96",
    "flite:kal16+p1.07r0.95",
    "flite:kal16+p1.14r1.00",
    "espeak:en-us",
    "espeak:en-us+p0.92r0.95",
    "espeak:en-us+m7",
    "espeak:en-gb-scotland+m1",
)


@dataclass(frozen=True, kw_only=True)
class SpokenCorpusConfig:
    """Who speaks, how much, and what is kept for measuring."""

    voices: tuple[str, ...] = VOICES
    """Voices of the training set, as `VoiceBankConfig` names them."""
    unseen_voice: str = "flite:rms"
    """Voice that speaks the held-out sentences once more and is never trained on; none: no such set."""
    flite_folder: str = ""
    """Where Flite's libraries were unpacked; what is not there is taken from the system."""
    held_out: int = 500
    """Sentences that are kept for measuring."""
    sentences: int = 0
    """Most sentences of the training set. 0: all there are."""
    passes: int = 2
    """How often each training sentence is spoken, every time by another voice; a pass begins when the last one is through."""
    minutes: float = 20.0
    """Time for all of it, counted over interrupted runs too; what is not spoken by then stays out."""
    speed_spread: float = 0.1
    """Training recordings are played at a speed drawn from 1 - this to 1 + this, pitch and all. 0: as spoken."""
    seed: int = 0
    """Decides the order of the sentences, who speaks which, and its speed."""

    def __post_init__(self) -> None:
        VoiceBankConfig(voices=self.voices)
        if self.unseen_voice:
            unseen = VoiceName.parse(self.unseen_voice).speaker
            if seen := [voice for voice in self.voices if VoiceName.parse(voice).speaker == unseen]:
                raise ValueError(
                    f"voices: {seen[0]} is {self.unseen_voice} in another key; take it out, or choose another unseen_voice"
                )
        if self.held_out < 1 or self.sentences < 0:
            raise ValueError(f"held_out={self.held_out} must be at least 1, and sentences={self.sentences} at least 0")
        if not 1 <= self.passes <= len(self.voices):
            raise ValueError(
                f"passes={self.passes} must be 1..{len(self.voices)}, since every pass takes another voice"
            )
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} must be above 0")
        if not 0 <= self.speed_spread <= 0.3:
            raise ValueError(f"speed_spread={self.speed_spread} must be 0..0.3; 0.1 is usual")


@dataclass(frozen=True)
class _Task:
    """A slice of one set, of which `first` is the number of its first sentence there; `turn`: how often the set was
    through before."""

    set_name: str
    turn: int
    first: int
    sentences: tuple[str, ...]

    def folder(self, corpus: Path) -> Path:
        return corpus / self.set_name / f"{self.turn}-{self.first:06d}"


def speak_corpus(
    sentences: Sequence[str], folder: Path, settings: SpokenCorpusConfig = SpokenCorpusConfig(), workers: int = 2
) -> dict[str, Any]:
    """Speak them into `folder`; returns what is there: hours and recordings of each set, rejects, minutes.

    A sentence that says the same as an earlier one is left out. The same call goes on where a killed one stopped, and
    every recording is the same whoever made it when. Raises ValueError when the folder was begun with other settings or
    sentences, or when there are too few sentences, and what `VoiceBank` raises; ChildProcessError when a worker was
    killed.
    """
    sets = split(sentences, settings)
    make_folder(folder)
    state = _begin(folder, settings, sets)
    tasks = [task for task in _tasks(sets, settings.passes) if not task.folder(folder).is_dir()]
    if tasks:
        _bank(settings)  # what is missing is said here, once
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        _run(tasks, folder, settings, state, workers)
    return _found(folder, state)


def split(sentences: Sequence[str], settings: SpokenCorpusConfig) -> dict[str, list[str]]:
    """The sentences of each set in the order in which they are spoken; no two say the same."""
    by_words: dict[str, str] = {}
    for sentence in sentences:
        by_words.setdefault(spoken_form(sentence), sentence)
    distinct = list(by_words.values())
    if len(distinct) <= settings.held_out:
        raise ValueError(
            f"{len(distinct)} different sentences are too few for held_out={settings.held_out} and training"
        )
    order = np.random.default_rng(settings.seed).permutation(len(distinct))
    shuffled = [distinct[i] for i in order]
    held_out, train = shuffled[: settings.held_out], shuffled[settings.held_out :]
    return {
        HELD_OUT: held_out,
        **({UNSEEN_VOICE: held_out} if settings.unseen_voice else {}),
        TRAIN: train[: settings.sentences or None],
    }


def _tasks(sets: dict[str, list[str]], passes: int) -> Iterator[_Task]:
    for name, sentences in sets.items():
        for turn in range(passes if name == TRAIN else 1):
            for first in range(0, len(sentences), SENTENCES_PER_TASK):
                yield _Task(name, turn, first, tuple(sentences[first : first + SENTENCES_PER_TASK]))


# --- the run


def _begin(folder: Path, settings: SpokenCorpusConfig, sets: dict[str, list[str]]) -> dict[str, Any]:
    """What is known of the folder's earlier runs; `minutes` may change between them."""
    made_with = config.fingerprint([config.to_dict(replace(settings, minutes=1.0, flite_folder="")), sets])
    path = folder / STATE
    state = json.loads(path.read_text()) if path.is_file() else {"fingerprint": made_with, "seconds": 0.0}
    if state["fingerprint"] != made_with:
        raise ValueError(
            f"{folder} was begun with other settings or sentences (fingerprint {state['fingerprint']}, now {made_with}); "
            "give another folder, or delete this one to start again"
        )
    write_json(path, state)
    return state


def _run(tasks: list[_Task], folder: Path, settings: SpokenCorpusConfig, state: dict[str, Any], workers: int) -> None:
    """Do tasks until all are done or the time is over; held-out sets are done whatever it takes."""
    begin, before_s = time.monotonic(), state["seconds"]
    speech_s, waiting, running = 0.0, list(reversed(tasks)), set[Future[tuple[int, float]]]()
    with (
        _pool(workers) as pool,
        tqdm(total=sum(len(task.sentences) for task in tasks), desc="speak", unit="sentence", mininterval=5.0) as bar,
    ):
        try:
            while waiting or running:
                state["seconds"] = before_s + time.monotonic() - begin
                if state["seconds"] > 60 * settings.minutes:
                    waiting = [task for task in waiting if task.set_name != TRAIN]
                while waiting and len(running) < 2 * workers:
                    running.add(pool.submit(_speak_task, waiting.pop(), folder, settings))
                finished, running = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
                for future in finished:
                    done, seconds = future.result()
                    speech_s += seconds
                    bar.set_postfix_str(_so_far(speech_s, time.monotonic() - begin, settings, state), refresh=False)
                    bar.update(done)
                    write_json(folder / STATE, state)
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed; what is spoken is kept, run the same again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if workers == 1:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=end_with_parent)


def _so_far(speech_s: float, seconds: float, settings: SpokenCorpusConfig, state: dict[str, Any]) -> str:
    left = max(0.0, settings.minutes - state["seconds"] / 60)
    return f"{speech_s / 3600:.2f} h, {speech_s / max(seconds, 1e-3):.0f} x real time, at most {left:.0f} min left"


def _found(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Counts over everything that is there."""
    found: dict[str, Any] = {"corpus.minutes": state["seconds"] / 60}
    rejects = 0
    for name in (TRAIN, HELD_OUT, UNSEEN_VOICE):
        rows = [row for table in sorted((folder / name).glob(f"*/{METADATA}")) for row in _lines(table)]
        found[f"corpus.{name}.recordings"] = len(rows)
        found[f"corpus.{name}.hours"] = sum(row["duration"] for row in rows) / 3600
        rejects += sum(len(_lines(table)) for table in (folder / name).glob(f"*/{REJECTS}"))
    found["corpus.rejects"] = rejects
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- in a worker


@functools.cache
def _bank(settings: SpokenCorpusConfig) -> VoiceBank:
    unseen = (settings.unseen_voice,) if settings.unseen_voice else ()
    return VoiceBankConfig(voices=(*settings.voices, *unseen), flite_folder=settings.flite_folder).build()


def _speak_task(task: _Task, corpus: Path, settings: SpokenCorpusConfig) -> tuple[int, float]:
    """-> sentences done, seconds of speech. The folder appears whole or not at all."""
    temporary = task.folder(corpus / UNFINISHED)
    temporary.mkdir(parents=True)
    rows, rejects = [], []
    for number, sentence in enumerate(task.sentences, task.first):
        voice, speed = _draw(settings, task, sentence)
        try:
            spoken = faster(_bank(settings).speak(sentence, voice), speed)
            row = _write(spoken, temporary / f"{number:06d}.flac")
        except ValueError as error:
            rejects.append({"text": sentence, "voice": voice, "detail": str(error)})
        else:
            rows.append(row | {"voice": voice, "speed": speed})
    for name, lines in ((METADATA, rows), (REJECTS, rejects)) if rejects else ((METADATA, rows),):
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (temporary / name).write_text(content, encoding="utf-8")
    done = task.folder(corpus)
    done.parent.mkdir(exist_ok=True)
    os.rename(temporary, done)
    return len(task.sentences), sum(row["duration"] for row in rows)


def _draw(settings: SpokenCorpusConfig, task: _Task, sentence: str) -> tuple[str, float]:
    """Voice and speed of a sentence: another voice in every pass, the same in every run."""
    if task.set_name == UNSEEN_VOICE:
        return settings.unseen_voice, 1.0
    rng = np.random.default_rng([settings.seed, zlib.crc32(sentence.encode())])
    voice = settings.voices[rng.permutation(len(settings.voices))[task.turn]]
    if task.set_name == HELD_OUT:
        return voice, 1.0
    return voice, round(1 + settings.speed_spread * rng.uniform(-1, 1, settings.passes)[task.turn], 2)


def _write(spoken: Utterance, path: Path) -> dict[str, Any]:
    """An utterance as a FLAC file; -> its row of the table beside it."""
    waveform = audio.check(audio.resample(spoken.audio, audio.SAMPLE_RATE))
    audio.save(path, replace(waveform, samples_S=np.clip(waveform.samples_S, -1, 1)))

    def rounded(time_s: float) -> float:
        """Down, so that no word ends behind the audio."""
        return math.floor(min(time_s, waveform.duration_s) * 10_000) / 10_000

    return {
        "path": path.name,
        "text": spoken.text,
        "duration": round(waveform.duration_s, 4),
        "words": [[w.text, rounded(w.start_s), rounded(w.end_s)] for w in spoken.alignment],
    }
