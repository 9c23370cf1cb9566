"""Spoken utterances -> batches of audio and ASR targets, for training the speech tokenizer.

Place in the pipeline: layer 2; implements `protocols.Loader` and yields `AudioBatch`.
Trap: all ranks walk one global list of batches, rank r takes numbers r, r + world_size, ... Every rank must therefore be
given the same utterances in the same order.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from speechquilt import audio
from speechquilt.data.corpus import Reject
from speechquilt.text import TextTokenizer, spoken_form
from speechquilt.types import IGNORE, AudioBatch, Utterance

LENGTH_JITTER = 0.1  # lengths are sorted with this much noise, so that batches differ between epochs
MAX_S_PER_WORD = 5.0  # a transcript with fewer words than this is not of this recording
INT16_SCALE = 32767.0


class UtteranceLoader:
    """Length-bucketed batches of at most `batch_seconds` of audio, padding included, for ever.

    Audio is resampled to 16 kHz and kept as int16. Targets are the ids of `spoken_form(text)`. `gain_db`: each clip of a
    batch is made louder or softer by up to this much, drawn from (seed, batch number). The first `sorted_epochs` go
    from short to long clips: CTC finds its alignments sooner on short ones. `rejects` lists what cannot be
    trained on, with the reason. Raises ValueError when nothing is left.
    """

    def __init__(
        self,
        utterances: Iterable[Utterance],
        text_tokenizer: TextTokenizer,
        *,
        batch_seconds: float,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        gain_db: float = 0.0,
        sorted_epochs: int = 0,
        token_samples: int = audio.TOKEN_SAMPLES,
    ) -> None:
        self.batch_seconds, self.seed, self.gain_db = batch_seconds, seed, gain_db
        self.sorted_epochs = sorted_epochs
        self.rank, self.world_size = rank, world_size
        self.rejects: list[Reject] = []
        self._audio: list[np.ndarray] = []
        self._text: list[list[int]] = []
        for utterance in utterances:
            self._add(utterance, text_tokenizer, token_samples)
        if not self._audio:
            raise ValueError(f"no utterance can be trained on: {self.reject_summary() or 'the corpus is empty'}")
        self._length_N = np.array([len(x) for x in self._audio])
        self._next = 0  # global number of the batch that rank 0 takes next
        self._epoch = 0
        self._epoch_start = 0  # global number of the epoch's first batch
        self._plan = self._plan_epoch(0)

    def __len__(self) -> int:
        return len(self._audio)

    @property
    def seconds(self) -> float:
        """Audio in one epoch."""
        return float(self._length_N.sum()) / audio.SAMPLE_RATE

    def reject_summary(self) -> str:
        """Rejects counted by reason, most frequent first."""
        counts = Counter(reject.reason for reject in self.rejects)
        return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())

    def next_batch(self) -> AudioBatch:
        number = self._next + self.rank
        while number >= self._epoch_start + len(self._plan):
            self._epoch_start += len(self._plan)
            self._epoch += 1
            self._plan = self._plan_epoch(self._epoch)
        self._next += self.world_size
        return self._batch(self._plan[number - self._epoch_start], number)

    def state_dict(self) -> dict:
        return {
            "next": self._next,
            "epoch": self._epoch,
            "epoch_start": self._epoch_start,
            "data": self._data_fingerprint(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on after the batch at which `state_dict` was called. Raises ValueError when made from other data."""
        if state["data"] != self._data_fingerprint():
            raise ValueError(
                f"loader state {state['data']} belongs to other utterances, batch_seconds or seed than these "
                f"({self._data_fingerprint()}); resume with the same data, or start a new run folder"
            )
        self._next, self._epoch, self._epoch_start = state["next"], state["epoch"], state["epoch_start"]
        self._plan = self._plan_epoch(self._epoch)

    def _add(self, utterance: Utterance, text_tokenizer: TextTokenizer, token_samples: int) -> None:
        try:
            samples_S = audio.resample(audio.check(utterance.audio), audio.SAMPLE_RATE).samples_S
            text = spoken_form(utterance.text)
            ids = text_tokenizer.encode(text)
            self._check_fit(len(samples_S), text, ids, token_samples)
        except ValueError as error:
            self.rejects.append(Reject(id=utterance.id, reason=str(error)))
            return
        self._audio.append(np.round(np.clip(samples_S, -1, 1) * INT16_SCALE).astype(np.int16))
        self._text.append(ids)

    def _check_fit(self, num_samples: int, text: str, ids: Sequence[int], token_samples: int) -> None:
        """Raise ValueError when audio and text cannot belong together or the clip exceeds a batch."""
        if not ids:
            raise ValueError("its text is empty in spoken form")
        if num_samples > self.batch_seconds * audio.SAMPLE_RATE:
            raise ValueError(f"longer than batch_seconds={self.batch_seconds}")
        if num_samples > MAX_S_PER_WORD * audio.SAMPLE_RATE * len(text.split()):
            raise ValueError(f"too long for its text, over {MAX_S_PER_WORD} s per word")
        # CTC needs one token per id and one more between equal neighbours.
        needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
        if needed > -(-num_samples // token_samples):
            raise ValueError("too short for its text, fewer speech tokens than text ids")

    def _plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches as utterance numbers: a pure function of (data, seed, epoch)."""
        draw = np.random.default_rng([self.seed, epoch])
        order_N = np.argsort(self._length_N * (1 + LENGTH_JITTER * draw.standard_normal(len(self))), kind="stable")
        limit = self.batch_seconds * audio.SAMPLE_RATE
        plan: list[list[int]] = [[]]
        longest = 0
        for i in order_N.tolist():
            longest = max(longest, int(self._length_N[i]))
            if plan[-1] and longest * (len(plan[-1]) + 1) > limit:
                plan.append([])
                longest = int(self._length_N[i])
            plan[-1].append(i)
        order = range(len(plan)) if epoch < self.sorted_epochs else draw.permutation(len(plan))
        return [np.array(plan[i]) for i in order]

    def _batch(self, rows_B: np.ndarray, number: int) -> AudioBatch:
        draw = np.random.default_rng([self.seed, number, 1])
        num_samples_B = self._length_N[rows_B]
        wav_BS = np.zeros((len(rows_B), num_samples_B.max()), dtype=np.float32)
        text_BL = np.full((len(rows_B), max(len(self._text[i]) for i in rows_B)), IGNORE, dtype=np.int64)
        gain_B = 10 ** (draw.uniform(-self.gain_db, self.gain_db, len(rows_B)) / 20)
        for b, i in enumerate(rows_B):
            wav_BS[b, : num_samples_B[b]] = self._audio[i] * (gain_B[b] / INT16_SCALE)
            text_BL[b, : len(self._text[i])] = self._text[i]
        return AudioBatch(
            wav_BS=torch.from_numpy(wav_BS),
            num_samples_B=torch.from_numpy(num_samples_B),
            text_BL=torch.from_numpy(text_BL),
        )

    def _data_fingerprint(self) -> str:
        digest = hashlib.sha256(
            repr((self.batch_seconds, self.seed, self.gain_db, self.sorted_epochs, self._text)).encode()
        )
        digest.update(self._length_N.tobytes())
        return digest.hexdigest()[:12]
