"""Short recordings joined into longer ones: rows of one to several sentences, with a pause between two of them.

A model that only hears single sentences never learns long ones, and one that hears filled windows alone is lost on a
short clip, so the number of recordings in a row is drawn anew for each row.
Trap: a row with a part that cannot be decoded is lost whole, since its text would say more than is heard.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from speechquilt import audio
from speechquilt.data.sources.speech_corpora import Entry, SpeechCorpus, at_16_khz
from speechquilt.types import AlignedWord, Reject, Utterance, Waveform


@dataclass(frozen=True, kw_only=True)
class JoinedSpeechConfig:
    """How recordings are joined into rows."""

    most: int = 4
    """Most recordings in a row; how many it has is drawn from 1 to this, each number as likely."""
    row_s: float = 20.0
    """Longest row, in seconds: it ends before the recording that would pass this. A single recording may be longer."""
    pause_s: float = 0.5
    """Longest pause between two recordings, in seconds; it is drawn from 0 to this."""
    passes: int = 1
    """Times through all recordings, joined otherwise each time; all passes together are one epoch."""
    seed: int = 0
    """Decides which recordings are joined."""

    def __post_init__(self) -> None:
        for key, least in (("most", 1), ("passes", 1), ("pause_s", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}")
        if self.row_s <= 0:
            raise ValueError(f"row_s={self.row_s} must be positive, seconds of speech in a row")

    def build(self, speech: SpeechCorpus) -> "JoinedSpeech":
        return JoinedSpeech(speech, self)


@dataclass(frozen=True)
class _Row:
    """Numbers of the recordings, and before each of them the pause in samples (none before the first)."""

    parts: tuple[int, ...]
    pauses: tuple[int, ...]


class JoinedSpeech:
    """A `SpeechCorpus` whose recordings are rows of recordings of `speech`, at 16 kHz.

    Which are joined follows from `config` and the lengths alone. What `speech` itself calls unusable comes after the
    rows, as the Reject that it is there.
    """

    def __init__(self, speech: SpeechCorpus, config: JoinedSpeechConfig) -> None:
        self._speech, self.config = speech, config
        entries = [speech.entry(index) for index in range(len(speech))]
        self._rejects = [entry for entry in entries if isinstance(entry, Reject)]
        self._entries = {index: entry for index, entry in enumerate(entries) if isinstance(entry, Entry)}

    def __len__(self) -> int:
        return len(self._rows) + len(self._rejects)

    def entry(self, index: int) -> Entry | Reject:
        if index >= len(self._rows):
            return self._rejects[index - len(self._rows)]
        row = self._rows[index]
        parts = [self._entries[part] for part in row.parts]
        duration_s = sum(part.duration_s for part in parts) + sum(row.pauses) / audio.SAMPLE_RATE
        return Entry(id=_joined(parts), text=" ".join(part.text for part in parts), duration_s=duration_s)

    def __getitem__(self, index: int, /) -> Utterance:
        """Raises what the corpus below raises for a part that cannot be used. Words have times when those of every part have."""
        if index >= len(self._rows):
            raise ValueError(self._rejects[index - len(self._rows)].reason)
        row = self._rows[index]
        parts = [self._speech[part] for part in row.parts]
        pieces: list[np.ndarray] = []
        words: list[AlignedWord] = []
        at = 0
        for part, pause in zip(parts, row.pauses):
            samples_S = at_16_khz(part.audio)
            at += pause
            words += _later(part.alignment, at / audio.SAMPLE_RATE)
            pieces += [np.zeros(pause, dtype=np.float32), samples_S]
            at += len(samples_S)
        return Utterance(
            id=_joined(parts),
            text=" ".join(part.text for part in parts),
            audio=Waveform(samples_S=np.concatenate(pieces), sample_rate=audio.SAMPLE_RATE),
            alignment=tuple(words) if all(part.alignment for part in parts) else (),
        )

    @cached_property
    def _rows(self) -> list[_Row]:
        return [row for number in range(self.config.passes) for row in self._pass(number)]

    def _pass(self, number: int) -> list[_Row]:
        """Every recording once."""
        draw = np.random.default_rng([self.config.seed, number])
        rows: list[_Row] = []
        parts: list[int] = []
        pauses: list[int] = []
        wanted, duration_s = 1, 0.0
        for index in draw.permutation(list(self._entries)).tolist():
            pause = int(draw.uniform(0, self.config.pause_s) * audio.SAMPLE_RATE)
            more_s = self._entries[index].duration_s + pause / audio.SAMPLE_RATE
            if parts and (len(parts) == wanted or duration_s + more_s > self.config.row_s):
                rows.append(_Row(tuple(parts), tuple(pauses)))
                parts, pauses, duration_s = [], [], 0.0
            if not parts:
                wanted, pause = int(draw.integers(1, self.config.most + 1)), 0
                more_s = self._entries[index].duration_s
            parts.append(index)
            pauses.append(pause)
            duration_s += more_s
        if parts:
            rows.append(_Row(tuple(parts), tuple(pauses)))
        return rows


def _joined(parts: list[Entry] | list[Utterance]) -> str:
    return "+".join(part.id for part in parts)


def _later(words: tuple[AlignedWord, ...], by_s: float) -> list[AlignedWord]:
    return [AlignedWord(text=w.text, start_s=w.start_s + by_s, end_s=w.end_s + by_s, score=w.score) for w in words]
