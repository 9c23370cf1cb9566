"""Pieces of recordings of one length, for training a vocoder.

Batch n is a pure function of (seed, n), and row b of it of (seed, n, b) alone, so ranks share the rows of a batch, threads
change nothing and a resumed run sees what the killed one would have. Every second of the corpus is as likely as any other.
Trap: a corpus says how long a recording is before it is decoded, and draws follow what it says. A broken recording is
found when it is drawn: it is noted, and another one is drawn for the row.

Axis letters: B rows, S samples.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.feed.ahead import Ahead
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_corpora import SpeechCorpus
from speechquilt.types import Reject, WaveBatch, Waveform

MAX_BROKEN = 0.1  # share of the recordings that may turn out to be broken when they are decoded
EDGE = 256  # samples on either side of a piece that are resampled with it and cut off: the filter reaches so far


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """How batches are cut out of recordings."""

    samples: int = 16_384
    """Samples of a piece at the vocoder's rate, whole frames of its mel. More: longer context, fewer pieces in memory.
    16,384 is 0.74 s at 22,050 Hz (Vocos)."""
    rows: int = 16
    """Pieces in a batch, over all ranks."""
    gain_db: float = 6.0
    """Each piece is made louder or softer by up to this many decibels, at random, but never beyond full scale. More:
    a vocoder that cares less how loud speech is. 0 leaves it as it is."""
    threads: int = 0
    """Threads that decode ahead of the training step; 0 decodes in between. The batches are the same."""

    def __post_init__(self) -> None:
        for key, least in (("samples", 1), ("rows", 1), ("threads", 0), ("gain_db", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")


class CropLoader:
    """A `protocols.Loader` of `WaveBatch`, at `sample_rate`, of this rank's rows.

    `numbers`: which recordings of the corpus are used, all by default. A recording shorter than a piece is followed by
    silence. `rejects` lists what cannot be used, with the reason; `close` ends the threads. Raises ValueError when nothing can
    be used or there are fewer rows than ranks, and from `next_batch` when more than `MAX_BROKEN` of the recordings are broken.
    """

    def __init__(
        self,
        corpus: SpeechCorpus,
        config: CropsConfig,
        sample_rate: int,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if config.rows < world_size:
            raise ValueError(f"rows={config.rows} must be at least 1 for each of {world_size} ranks; raise it")
        self.corpus, self.config, self.sample_rate, self.seed = corpus, config, sample_rate, seed
        self._rows = range(rank, config.rows, world_size)
        self._broken: dict[int, Reject] = {}  # number -> why it could not be decoded
        self._unusable: list[Reject] = []
        self._survey(range(len(corpus)) if numbers is None else numbers)
        self._ahead = Ahead(self._load, config.threads, "crops")
        self._done = 0  # batches given out

    def __len__(self) -> int:
        return len(self._number_N)

    @property
    def seconds(self) -> float:
        """Audio that pieces are cut out of, as the corpus says."""
        return float(self._end_N[-1])

    @property
    def rejects(self) -> list[Reject]:
        return [*self._unusable, *(reject for _, reject in sorted(self._broken.copy().items()))]

    def reject_summary(self) -> str:
        """Rejects counted by reason, most frequent first."""
        counts = Counter(reject.reason for reject in self.rejects)
        return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())

    def next_batch(self) -> WaveBatch:
        batch = self._ahead.get(self._done)
        self._done += 1
        return batch

    def state_dict(self) -> dict:
        return {"next": self._done, "data": self._fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on after the batch at which `state_dict` was called. Raises ValueError when made from other data."""
        if state["data"] != self._fingerprint:
            raise ValueError(
                f"loader state {state['data']} belongs to other recordings, pieces or seed than these "
                f"({self._fingerprint}); resume with the same data, or start a new run folder"
            )
        self._ahead.forget()
        self._done = state["next"]

    def close(self) -> None:
        """End the threads; batches that wait are dropped, the state stays that of the last one given out."""
        self._ahead.close()

    def _survey(self, numbers: Sequence[int]) -> None:
        """Look at every entry once: which can be used, and how long they are."""
        usable: list[int] = []
        seconds: list[float] = []
        for number in numbers:
            found = self.corpus.entry(number)
            if isinstance(found, Reject):
                self._unusable.append(found)
            elif found.duration_s <= 0:
                self._unusable.append(Reject(id=found.id, reason="audio is empty", detail=f"{found.id}: 0 s long"))
            else:
                usable.append(number)
                seconds.append(found.duration_s)
        if not usable:
            raise ValueError(
                f"none of {len(numbers)} recordings can be used: {self.reject_summary() or 'there are none'}"
            )
        self._number_N, self._end_N = np.array(usable), np.cumsum(seconds)
        config = self.config
        settings = (config.samples, config.rows, config.gain_db, self.sample_rate, self.seed)
        digest = hashlib.sha256(repr(settings).encode())
        digest.update(self._number_N.tobytes() + self._end_N.tobytes())
        self._fingerprint = digest.hexdigest()[:12]

    def _load(self, number: int) -> WaveBatch:
        pieces = [self._piece(np.random.default_rng([self.seed, number, row])) for row in self._rows]
        return WaveBatch(wav_BS=torch.from_numpy(np.stack(pieces)), number=number)

    def _piece(self, draw: np.random.Generator) -> np.ndarray:
        while True:
            place, where, loudness = draw.random(), draw.random(), draw.uniform(-1, 1)
            number = int(self._number_N[np.searchsorted(self._end_N, place * self._end_N[-1], side="right")])
            decoded = self._decode(number)
            if decoded is not None:
                return self._with_gain(self._cut(decoded, where), loudness)

    def _decode(self, number: int) -> Waveform | None:
        """The recording at its own rate, or None when it is broken, which is noted."""
        if number in self._broken:
            return None
        try:
            return audio.check(self.corpus[number].audio)
        except (ValueError, OSError) as error:
            entry = self.corpus.entry(number)
            self._broken[number] = _reject(entry.id, error)
        if len(self._broken) > MAX_BROKEN * len(self):
            raise ValueError(
                f"{len(self._broken)} of {len(self)} recordings cannot be decoded, more than {MAX_BROKEN:.0%}: "
                f"{self._broken[number].id}: {self._broken[number].detail}; mend the corpus or the path it is read from"
            )
        return None

    def _cut(self, recording: Waveform, where: float) -> np.ndarray:
        """The piece that begins at share `where` of the places where one can; it alone is resampled, with edges."""
        wanted, rate = self.config.samples, recording.sample_rate
        length = -(-wanted * rate // self.sample_rate)  # in the recording's own samples
        start = int(where * max(1, len(recording.samples_S) - length + 1))
        begin = max(0, start - EDGE)
        samples_S = np.ascontiguousarray(recording.samples_S[begin : start + length + EDGE])
        samples_S = audio.resample(Waveform(samples_S=samples_S, sample_rate=rate), self.sample_rate).samples_S
        skip = round((start - begin) * self.sample_rate / rate)
        piece_S = samples_S[skip : skip + wanted]
        return np.pad(piece_S, (0, wanted - len(piece_S)))

    def _with_gain(self, piece_S: np.ndarray, loudness: float) -> np.ndarray:
        """Louder or softer by share `loudness` in [-1, 1] of `gain_db`; within [-1, 1]."""
        gain = 10 ** (loudness * self.config.gain_db / 20)
        return (piece_S * min(gain, 1 / max(np.abs(piece_S).max(), 1e-9))).astype(np.float32)


def _reject(id: str, error: Exception) -> Reject:
    if isinstance(error, BrokenAudio):
        return Reject(id=id, reason=error.reason, detail=error.detail or error.reason)
    return Reject(id=id, reason=str(error), detail=str(error))
