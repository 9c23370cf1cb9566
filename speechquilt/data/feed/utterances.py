"""Spoken utterances -> batches of audio and ASR targets, for training the speech tokenizer.

The loader yields `AudioBatch`. What can be read is defined in `speech_corpora`, which recordings go together in
`duration_batches`.
Trap: all ranks walk one global list of batches, rank r takes numbers r, r + world_size, ... Every rank must therefore
be given the same utterances in the same order.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.feed.duration_batches import bucket, epoch_rows
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_corpora import (
    INT16_SCALE,
    Entry,
    Mix,
    SpeechCorpus,
    UtteranceList,
    at_16_khz,
    to_int16,
)
from speechquilt.data.sources.speech_rows import same_length
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.types import IGNORE, AudioBatch, Reject, Utterance

MAX_S_PER_WORD = 5.0  # a transcript with fewer words than this is not of this recording
MAX_BROKEN = 0.1  # share of the recordings that may turn out to be broken when they are decoded
CHARACTERS_PER_WORD = 5  # in scripts without spaces
SURVEYED_AT_ONCE = 4096  # entries
AHEAD_PER_THREAD = 2  # batches that wait in memory, per thread


@dataclass(frozen=True)
class _Place:
    """Where a rank stands: `next` is the global number of the batch that rank 0 takes next, `start` that of the epoch's
    first one."""

    next: int = 0
    epoch: int = 0
    start: int = 0


@dataclass(frozen=True)
class _Job:
    """Batch `number` of the stream, entry `index` of its epoch's plan."""

    plan: list[np.ndarray]
    index: int
    number: int


class UtteranceLoader:
    """Length-bucketed batches of at most `batch_seconds` of audio, padding included, for ever.

    `utterances`: utterances in memory, a `SpeechCorpus` that is decoded batch by batch, or a `Mix` of several. Audio is
    resampled to 16 kHz and rounded to int16. Targets are the ids of `target_form(text)`, at most `max_ids` of them. `gain_db`:
    each clip of a batch is made louder or softer by up to this much, drawn from (seed, batch number). The first
    `sorted_epochs` go from short to long clips: CTC finds its alignments sooner on short ones.

    `threads` decode ahead of the training step; at most `AHEAD_PER_THREAD` batches for each wait in memory. They change
    nothing about the batches, and the state is that of the last batch given out. `close` ends them.

    `rejects` lists what cannot be trained on, with the reason. A recording that turns out to be broken when it is decoded
    is left out of its batch; so is a batch of nothing else, in favour of the next one. Raises ValueError when nothing is left,
    and from `next_batch` when more than `MAX_BROKEN` of the recordings were broken.
    """

    def __init__(
        self,
        utterances: Iterable[Utterance] | SpeechCorpus | Mix,
        text_tokenizer: TextTokenizer,
        *,
        batch_seconds: float,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        gain_db: float = 0.0,
        sorted_epochs: int = 0,
        token_samples: int = audio.TOKEN_SAMPLES,
        target_form: Callable[[str], str] = spoken_form,
        max_ids: int | None = None,
        threads: int = 0,
    ) -> None:
        self.batch_seconds, self.seed, self.gain_db = batch_seconds, seed, gain_db
        self.sorted_epochs = sorted_epochs
        self.rank, self.world_size = rank, world_size
        self._mix = _as_mix(utterances)
        self._targets = _Targets(text_tokenizer, target_form, max_ids, token_samples, batch_seconds)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "utterances") if threads else None
        self._broken: dict[int, Reject] = {}  # row -> why it could not be decoded
        self._unusable: list[Reject] = []
        self._survey()
        self._done = _Place()  # after the last batch that was given out
        self._asked = _Place()  # after the last one that a thread was sent for
        self._waiting: deque[tuple[Future[AudioBatch], _Place]] = deque()
        self._plan_epoch, self._plan = 0, self._make_plan(0)

    def __len__(self) -> int:
        return len(self._length_N)

    @property
    def seconds(self) -> float:
        """Audio in one pass over every recording."""
        return float(self._length_N.sum()) / audio.SAMPLE_RATE

    @property
    def rejects(self) -> list[Reject]:
        return [*self._unusable, *(reject for _, reject in sorted(self._broken.copy().items()))]

    def reject_summary(self) -> str:
        """Rejects counted by reason, most frequent first."""
        counts = Counter(reject.reason for reject in self.rejects)
        return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())

    def next_batch(self) -> AudioBatch:
        if self._pool is None:
            job, self._done = self._take(self._done)
            return self._load(job)
        while len(self._waiting) <= AHEAD_PER_THREAD * self._threads:
            job, self._asked = self._take(self._asked)
            self._waiting.append((self._pool.submit(self._load, job), self._asked))
        loading, self._done = self._waiting.popleft()
        return loading.result()

    def state_dict(self) -> dict:
        return {
            "next": self._done.next,
            "epoch": self._done.epoch,
            "epoch_start": self._done.start,
            "data": self._fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the batch at which `state_dict` was called. Raises ValueError when made from other data."""
        if state["data"] != self._fingerprint:
            raise ValueError(
                f"loader state {state['data']} belongs to other utterances, batch_seconds or seed than these "
                f"({self._fingerprint}); resume with the same data, or start a new run folder"
            )
        self._forget_waiting()
        self._done = self._asked = _Place(state["next"], state["epoch"], state["epoch_start"])

    def close(self) -> None:
        """End the threads; batches that wait are dropped, the state stays that of the last one given out."""
        self._forget_waiting()
        self._asked = self._done
        if self._pool is not None:
            self._pool.shutdown()

    def _forget_waiting(self) -> None:
        for loading, _ in self._waiting:
            loading.cancel()
        self._waiting.clear()

    def _survey(self) -> None:
        """Look at every entry once: which can be trained on, how long they are, what they say."""
        lengths: list[int] = []
        texts: list[np.ndarray] = []
        places: list[tuple[int, int]] = []
        self._num_rows: list[int] = []  # usable ones per corpus
        for source, corpus in enumerate(self._mix.corpora):
            for index, found in enumerate(self._entries(corpus)):
                try:
                    num_samples, ids_L = self._targets.check(found)
                except ValueError as error:
                    self._unusable.append(_reject(found.id, error))
                    continue
                lengths.append(num_samples)
                texts.append(ids_L)
                places.append((source, index))
            self._num_rows.append(len(lengths) - sum(self._num_rows))
            if not self._num_rows[-1]:
                raise ValueError(f"no utterance can be trained on: {self.reject_summary()}")
        self._length_N = np.array(lengths)
        self._place_N2 = np.array(places)  # corpus and number in it
        self._text_start_N = np.cumsum([0, *map(len, texts)])
        self._text_ids = np.concatenate(texts)
        self._fingerprint = self._data_fingerprint()

    def _entries(self, corpus: SpeechCorpus) -> Iterator[Entry | Reject]:
        """All of them in order, read by the threads: where durations come from headers, each costs a look into a file."""
        for first in range(0, len(corpus), SURVEYED_AT_ONCE):
            numbers = range(first, min(len(corpus), first + SURVEYED_AT_ONCE))
            yield from map(corpus.entry, numbers) if self._pool is None else self._pool.map(corpus.entry, numbers)

    def _take(self, at: _Place) -> tuple[_Job, _Place]:
        """This rank's batch at a place, and the place after it."""
        number, epoch, start = at.next + self.rank, at.epoch, at.start
        while number >= start + len(plan := self._plan_of(epoch)):
            start += len(plan)
            epoch += 1
        return _Job(plan, number - start, number), _Place(at.next + self.world_size, epoch, start)

    def _plan_of(self, epoch: int) -> list[np.ndarray]:
        if epoch != self._plan_epoch:
            self._plan_epoch, self._plan = epoch, self._make_plan(epoch)
        return self._plan

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches as row numbers: a pure function of (data, seed, epoch)."""
        draw = np.random.default_rng([self.seed, epoch])
        rows_N = epoch_rows(self._num_rows, self._mix.ratio, self.seed, epoch)
        batches = bucket(rows_N, self._length_N, self.batch_seconds * audio.SAMPLE_RATE, draw)
        order = range(len(batches)) if epoch < self.sorted_epochs else draw.permutation(len(batches))
        return [batches[i] for i in order]

    def _load(self, job: _Job) -> AudioBatch:
        for step in range(len(job.plan)):
            rows_B = job.plan[(job.index + step) % len(job.plan)]
            heard = [(int(row), samples_S) for row in rows_B if (samples_S := self._decode(int(row))) is not None]
            if heard:
                return self._batch([row for row, _ in heard], [samples_S for _, samples_S in heard], job.number)
        raise ValueError(f"nothing of this epoch can be decoded: {self.reject_summary()}")

    def _decode(self, row: int) -> np.ndarray | None:
        """The recording as int16, or None when it is broken, which is noted."""
        source, index = self._place_N2[row].tolist()
        try:
            samples_S = at_16_khz(self._mix.corpora[source][index].audio)
            self._check_planned(row, len(samples_S))
            return to_int16(samples_S)
        except (ValueError, OSError) as error:
            entry = self._mix.corpora[source].entry(index)
            self._broken[row] = _reject(entry.id, error)
        if len(self._broken) > MAX_BROKEN * len(self):
            raise ValueError(
                f"{len(self._broken)} of {len(self)} recordings cannot be decoded, more than {MAX_BROKEN:.0%}: "
                f"{self._broken[row].id}: {self._broken[row].detail}; mend the corpus or the path it is read from"
            )
        return None

    def _check_planned(self, row: int, num_samples: int) -> None:
        """A batch holds as many recordings as fit by their planned lengths; a much longer one would burst it, and a much shorter one is
        not all of what its text says."""
        planned_s, heard_s = int(self._length_N[row]) / audio.SAMPLE_RATE, num_samples / audio.SAMPLE_RATE
        if not same_length(planned_s, heard_s):
            raise BrokenAudio(
                "not as long as its header or manifest says",
                f"{heard_s:.1f} s long, but its header or manifest says {planned_s:.1f} s; mend the duration",
            )

    def _batch(self, rows: list[int], samples: list[np.ndarray], number: int) -> AudioBatch:
        draw = np.random.default_rng([self.seed, number, 1])
        texts = [self._text_ids[self._text_start_N[row] : self._text_start_N[row + 1]] for row in rows]
        num_samples_B = np.array([len(samples_S) for samples_S in samples])
        wav_BS = np.zeros((len(rows), num_samples_B.max()), dtype=np.float32)
        text_BL = np.full((len(rows), max(map(len, texts))), IGNORE, dtype=np.int64)
        gain_B = 10 ** (draw.uniform(-self.gain_db, self.gain_db, len(rows)) / 20)
        for b, (samples_S, ids_L) in enumerate(zip(samples, texts)):
            wav_BS[b, : len(samples_S)] = samples_S * (gain_B[b] / INT16_SCALE)
            text_BL[b, : len(ids_L)] = ids_L
        return AudioBatch(
            wav_BS=torch.from_numpy(wav_BS),
            num_samples_B=torch.from_numpy(num_samples_B),
            text_BL=torch.from_numpy(text_BL),
        )

    def _data_fingerprint(self) -> str:
        settings = (self.batch_seconds, self.seed, self.gain_db, self.sorted_epochs, tuple(self._mix.ratio))
        digest = hashlib.sha256(repr((settings, self._num_rows)).encode())
        for array in (self._text_ids, self._text_start_N, self._length_N):
            digest.update(array.tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class _Targets:
    """From an entry's text to ids, and whether audio and text can belong together."""

    text_tokenizer: TextTokenizer
    form: Callable[[str], str]
    max_ids: int | None
    token_samples: int
    batch_seconds: float

    def check(self, entry: Entry | Reject) -> tuple[int, np.ndarray]:
        """Samples at 16 kHz and target ids. Raises ValueError saying why the entry cannot be trained on."""
        if isinstance(entry, Reject):
            raise BrokenAudio(entry.reason, entry.detail)
        text = self.form(entry.text)
        ids = self.text_tokenizer.encode(text)
        num_samples = int(entry.duration_s * audio.SAMPLE_RATE + 0.5)  # as soxr rounds
        if not text.strip():
            raise ValueError("its text is empty in spoken form")
        if self.max_ids is not None and len(ids) > self.max_ids:
            raise ValueError(f"its text has more than max_ids={self.max_ids} ids")
        if num_samples > self.batch_seconds * audio.SAMPLE_RATE:
            raise ValueError(f"longer than batch_seconds={self.batch_seconds}")
        if num_samples > MAX_S_PER_WORD * audio.SAMPLE_RATE * max(len(text.split()), len(text) // CHARACTERS_PER_WORD):
            raise ValueError(f"too long for its text, over {MAX_S_PER_WORD} s per word")
        # CTC needs one token per id and one more between equal neighbours.
        needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        if needed > -(-num_samples // self.token_samples):
            raise ValueError("too short for its text, fewer speech tokens than text ids")
        return num_samples, np.array(ids, dtype=np.int32)


def _reject(id: str, error: Exception) -> Reject:
    if isinstance(error, BrokenAudio):
        return Reject(id=id, reason=error.reason, detail=error.detail or error.reason)
    return Reject(id=id, reason=str(error), detail=str(error))


def _as_mix(utterances: Iterable[Utterance] | SpeechCorpus | Mix) -> Mix:
    if isinstance(utterances, Mix):
        return utterances
    corpus = utterances if isinstance(utterances, SpeechCorpus) else UtteranceList(utterances)
    return Mix(corpora=(corpus,), ratio=(1,))
