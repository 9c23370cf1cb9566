"""The nouns every stage shares: Waveform, AlignedWord, Utterance, Segment, Document, Batch.

Trap: `unit_end_T`, `opens` and `closes` are three different things. `unit_end_T` says where a *word or silence* of speech
ends and belongs to the data; `opens` / `closes` say where a *patch* begins and when its end becomes known, and are made
by a patcher for one training sequence.

Axis letters, used everywhere: B rows, T tokens, P patches (units), S audio samples, F frames, D width, H heads, K head
width, V vocabulary.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch

Modality = Literal["text", "speech"]
IGNORE = -100  # label of a token that is not predicted
SILENCE = -1  # word index of a speech token that belongs to no word
Row = dict[str, Any]  # plain JSON data: one line of a table or of the input list of a job


class UnitEnd(IntEnum):
    """What ends with a speech token: nothing, a word, a run of silence, or a BPE piece inside a word."""

    NONE = 0
    WORD = 1
    SILENCE = 2
    PIECE = 3


@dataclass(frozen=True, kw_only=True)
class Waveform:
    """Mono audio. `samples_S`: float32 in [-1, 1]; `sample_rate` in Hz."""

    samples_S: np.ndarray
    sample_rate: int

    @property
    def duration_s(self) -> float:
        return len(self.samples_S) / self.sample_rate


@dataclass(frozen=True, kw_only=True)
class AlignedWord:
    """One word and its place in the audio, in seconds. `score` is the aligner's confidence, 1 for exact times."""

    text: str
    start_s: float
    end_s: float
    score: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One recording with its transcript; `alignment` is empty when word times are unknown."""

    id: str
    text: str
    audio: Waveform
    alignment: tuple[AlignedWord, ...] = ()

    @property
    def duration_s(self) -> float:
        return self.audio.duration_s


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An item that could not be used, and why: a short class of fault that is counted, and what a person needs to mend it."""

    id: str
    reason: str
    detail: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """One plain-text document."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One run of one modality.

    `ids_T`: int32 LOCAL ids (text-tokenizer ids or codebook indices; `vocab.Vocab` turns them into model ids).
    `unit_end_T`: uint8 `UnitEnd` codes, not NONE on the last speech token of each word, silence run and (where the data
    marks them) BPE piece; None when unknown, and for text.
    `loss`: False when this segment is only context (the source side of an ASR or TTS pair).
    """

    modality: Modality
    ids_T: np.ndarray
    unit_end_T: np.ndarray | None = None
    loss: bool = True

    def __post_init__(self) -> None:
        if self.unit_end_T is not None and len(self.unit_end_T) != len(self.ids_T):
            raise ValueError(
                f"unit_end_T has {len(self.unit_end_T)} entries for {len(self.ids_T)} ids; they must match"
            )


@dataclass(frozen=True, kw_only=True)
class AlignedTokens:
    """One recording as speech tokens with its words.

    `words` as spoken, they may carry punctuation; `ids_T` LOCAL speech ids; `word_T` the word that each token belongs to,
    SILENCE for none, never going back. A word too short for a token of its own has none. When the words have no times,
    `words` is the whole text alone and every token belongs to it. Raises ValueError when these do not fit together.
    """

    id: str
    text: str
    words: tuple[str, ...]
    ids_T: np.ndarray
    word_T: np.ndarray

    def __post_init__(self) -> None:
        if len(self.ids_T) != len(self.word_T):
            raise ValueError(
                f"{self.id}: {len(self.ids_T)} speech tokens but {len(self.word_T)} word indices; there must be one of each"
            )
        spoken = self.word_T[self.word_T != SILENCE]
        if len(spoken) and (spoken.min() < 0 or spoken.max() >= len(self.words) or (np.diff(spoken) < 0).any()):
            raise ValueError(
                f"{self.id}: word_T must rise from 0 to {len(self.words) - 1} between silences ({SILENCE})"
            )

    @property
    def unit_end_T(self) -> np.ndarray:
        """uint8 `UnitEnd` codes: the last token of every word and of every maximal run of silence."""
        ends_T = np.ones(len(self.word_T), dtype=bool)
        ends_T[:-1] = self.word_T[1:] != self.word_T[:-1]
        kind_T = np.where(self.word_T == SILENCE, UnitEnd.SILENCE, UnitEnd.WORD)
        return np.where(ends_T, kind_T, UnitEnd.NONE).astype(np.uint8)

    @property
    def has_word_times(self) -> bool:
        """Whether its words have times; without them it is one unit that spans all of its words, if it has any."""
        return len(self.words) > 1 or (" " not in self.text and bool(self.text))

    def segment(self, *, loss: bool = True) -> Segment:
        """The whole recording; word ends only when its words have times."""
        unit_end_T = self.unit_end_T if self.has_word_times else None
        return Segment(modality="speech", ids_T=self.ids_T, unit_end_T=unit_end_T, loss=loss)


@dataclass(frozen=True, kw_only=True)
class Document:
    """Segments in reading order, the unit of shuffling and packing. `source` names the mixture entry it belongs to."""

    id: str
    segments: tuple[Segment, ...]
    source: str

    def num_tokens(self, modality: Modality | None = None) -> int:
        return sum(len(s.ids_T) for s in self.segments if modality in (None, s.modality))


@dataclass(frozen=True, kw_only=True)
class SpokenSpan:
    """Output of a text-to-token model for one text: local speech ids, their `UnitEnd` codes, and why it was rejected
    ("" = good)."""

    ids_T: np.ndarray
    unit_end_T: np.ndarray
    reject: str = ""


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A Document as one sequence of model ids, made by `vocab.Vocab.lay_out` and read by patchers and the packer.

    `ids_T` int64; `is_speech_T` bool, False on text and special tokens; `loss_T` bool, this token may be a target;
    `unit_end_T` uint8 `UnitEnd` codes, or None when some speech of the document has no word ends.
    """

    id: str
    source: str
    ids_T: np.ndarray
    is_speech_T: np.ndarray
    loss_T: np.ndarray
    unit_end_T: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The only thing a language model receives.

    `ids_BT` int64 model ids; `labels_BT` int64, aligned with the logits (label at t is the id at t + 1 or IGNORE);
    `doc_BT` int64 document index inside the row, never decreasing, padding is the last document of its row;
    `opens_BT` / `closes_BT` bool or None: token t is the first of its unit / after reading t we know its unit is
    complete. None is a plain token-level model.
    `num_units`, `num_local`: sizes of the axes that a latent model makes, at least the most units of a row and the most
    tokens of a row that lie in speech spans (their markers included). None = counted, which waits for the device.
    `meta` carries what metrics want and models do not (document ids, sources); never tensors.
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    doc_BT: torch.Tensor
    opens_BT: torch.Tensor | None = None
    closes_BT: torch.Tensor | None = None
    num_units: int | None = None
    num_local: int | None = None
    meta: dict = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return Batch(
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            doc_BT=self.doc_BT.to(device, non_blocking=True),
            opens_BT=move(self.opens_BT),
            closes_BT=move(self.closes_BT),
            num_units=self.num_units,
            num_local=self.num_local,
            meta=self.meta,
        )

    @property
    def unit_BT(self) -> torch.Tensor:
        """Index of the unit each token belongs to, counted along the row: int64 [B, T]."""
        if self.opens_BT is None:
            return torch.arange(self.ids_BT.shape[1], device=self.ids_BT.device).expand_as(self.ids_BT)
        return self.opens_BT.long().cumsum(1) - 1

    @property
    def visible_BT(self) -> torch.Tensor:
        """Number of units whose global output the prediction made at t may read: int64 [B, T]."""
        if self.closes_BT is None:
            return self.unit_BT + 1
        return self.unit_BT + self.closes_BT.long()

    def validate(self) -> "Batch":
        """Check the invariants that need no vocabulary; raises ValueError naming the first one broken."""
        shape = self.ids_BT.shape
        for name in ("labels_BT", "doc_BT", "opens_BT", "closes_BT"):
            x = getattr(self, name)
            if x is not None and x.shape != shape:
                raise ValueError(f"Batch.{name} has shape {tuple(x.shape)}, ids_BT has {tuple(shape)}; they must match")
        if (self.opens_BT is None) != (self.closes_BT is None):
            raise ValueError(
                "Batch.opens_BT and closes_BT come together: give both, or neither for a token-level model"
            )
        if shape[1] == 0:
            return self
        new_doc_BT = torch.ones_like(self.doc_BT, dtype=torch.bool)
        new_doc_BT[:, 1:] = self.doc_BT[:, 1:] != self.doc_BT[:, :-1]
        if (self.doc_BT[:, 1:] < self.doc_BT[:, :-1]).any():
            raise ValueError("Batch.doc_BT decreases inside a row; documents must be numbered in order")
        labelled_BT = self.labels_BT != IGNORE
        if (labelled_BT[:, :-1] & new_doc_BT[:, 1:]).any() or labelled_BT[:, -1].any():
            raise ValueError("Batch.labels_BT crosses a document end; the last token of a document must be ignored")
        wrong = labelled_BT[:, :-1] & (self.labels_BT[:, :-1] != self.ids_BT[:, 1:])
        if wrong.any():
            raise ValueError("Batch.labels_BT is not the next token; labels must be ids shifted by one or ignored")
        if self.opens_BT is not None and self.closes_BT is not None:
            if (new_doc_BT & ~self.opens_BT).any():
                raise ValueError("Batch.opens_BT: a unit crosses a document start; every document opens a unit")
            reopened = self.closes_BT[:, :-1] & ~self.opens_BT[:, 1:]
            if reopened.any():
                raise ValueError("Batch.closes_BT: a token follows a closed unit without opening a new one")
        return self


@dataclass(frozen=True, kw_only=True)
class AudioBatch:
    """What the speech tokenizer trains on: right-padded audio and the ASR targets.

    `wav_BS` float32, `num_samples_B` int64; `text_BL` int64 text-tokenizer ids, padded with IGNORE.
    """

    wav_BS: torch.Tensor
    num_samples_B: torch.Tensor
    text_BL: torch.Tensor

    def to(self, device: torch.device | str) -> "AudioBatch":
        return AudioBatch(
            wav_BS=self.wav_BS.to(device, non_blocking=True),
            num_samples_B=self.num_samples_B.to(device, non_blocking=True),
            text_BL=self.text_BL.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class WaveBatch:
    """What a vocoder trains on: `wav_BS` float32, rows of one length; `number` of the batch in its run, from 0."""

    wav_BS: torch.Tensor
    number: int

    @property
    def meta(self) -> dict[str, int]:
        """What to name when its loss is not finite."""
        return {"batch": self.number}

    def to(self, device: torch.device | str) -> "WaveBatch":
        return WaveBatch(wav_BS=self.wav_BS.to(device, non_blocking=True), number=self.number)
