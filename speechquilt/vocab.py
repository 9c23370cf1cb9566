"""One id space for the language models: text | special | speech. Documents become ids here and nowhere else.

Shards hold LOCAL ids, which count from 0 in each modality; models hold the ids of this space. No other module computes
with these offsets.
Trap: the last ids are padding (`size` is rounded up for the GPU); no document has them.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from speechquilt.types import Document, LaidOut, Modality, Segment

ROUND_TO = 64  # tensor cores like a vocabulary that is a multiple of this


class Special(IntEnum):
    """Special tokens, in id order. `TEXT` / `SPEECH` open a span (the papers' `<t>` / `<s>`, begin/end of audio)."""

    PAD = 0
    BOS = 1
    EOS = 2
    TEXT = 3
    SPEECH = 4
    WORD_END = 5  # text-to-token models only: ends a word's speech tokens; stripped before tokens reach a shard


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """The layout of all ids: text, special tokens, speech, and padding up to `size`."""

    num_text: int
    """Ids of the text tokenizer, 0 to num_text - 1."""
    num_speech: int
    """Entries of the speech tokenizer's codebook; their ids follow the special tokens'."""
    opening_marker: bool = True
    """Whether text that opens a document has its marker, as in the papers. Without it the document begins as those that
    a text model was trained on: BOS, then text."""

    @property
    def size(self) -> int:
        used = self.num_text + len(Special) + self.num_speech
        return -(-used // ROUND_TO) * ROUND_TO

    @property
    def speech_start(self) -> int:
        return self.num_text + len(Special)

    def special(self, token: Special) -> int:
        return self.num_text + token

    @property
    def pad(self) -> int:
        return self.special(Special.PAD)

    @property
    def bos(self) -> int:
        return self.special(Special.BOS)

    @property
    def eos(self) -> int:
        return self.special(Special.EOS)

    @property
    def word_end(self) -> int:
        return self.special(Special.WORD_END)

    def marker(self, modality: Modality) -> int:
        """Id of the token that opens a span of this modality."""
        return self.special(Special.TEXT if modality == "text" else Special.SPEECH)

    def to_model(self, modality: Modality, ids_T: np.ndarray) -> np.ndarray:
        """Local ids -> model ids. Raises ValueError on an id outside the modality's range."""
        limit = self.num_text if modality == "text" else self.num_speech
        ids_T = np.asarray(ids_T, dtype=np.int64)
        if ids_T.size and (ids_T.min() < 0 or ids_T.max() >= limit):
            raise ValueError(
                f"{modality} id {int(ids_T.max() if ids_T.max() >= limit else ids_T.min())} is outside 0..{limit - 1}: "
                "these tokens were made with another tokenizer than this vocabulary"
            )
        return ids_T if modality == "text" else ids_T + self.speech_start

    def to_local(self, modality: Modality, ids_T: np.ndarray) -> np.ndarray:
        """Model ids of this modality's tokens -> local ids: the inverse of `to_model`."""
        return np.asarray(ids_T) - (self.speech_start if modality == "speech" else 0)

    def is_speech(self, ids: Any) -> Any:
        """Mask of model ids (numpy, torch or one int) that are speech tokens."""
        return (ids >= self.speech_start) & (ids < self.speech_start + self.num_speech)

    def is_text(self, ids: Any) -> Any:
        """Mask of model ids (numpy, torch or one int) that are text tokens, not special ones."""
        return ids < self.num_text

    def num_laid_out(self, document: Document) -> int:
        """Tokens of `lay_out`."""
        num_markers = len(document.segments) - self._opens_bare(document)
        return document.num_tokens() + num_markers + 2

    def lay_out(self, document: Document) -> LaidOut:
        """BOS, then a marker and the ids of every segment, then EOS; without `opening_marker` no marker in front of text
        that opens the document.

        A marker is a target only when the segment it opens is one and is not introduced by context: after the source
        side of a pair the modality is given, not predicted (spec 1, 6.2).
        """
        num_tokens, opens_bare = self.num_laid_out(document), self._opens_bare(document)
        ids_T = np.empty(num_tokens, dtype=np.int64)
        is_speech_T, loss_T = np.zeros(num_tokens, dtype=bool), np.zeros(num_tokens, dtype=bool)
        unit_end_T, has_ends = np.zeros(num_tokens, dtype=np.uint8), True
        ids_T[0], ids_T[-1] = self.bos, self.eos
        at, previous_loss = 1, True
        for number, segment in enumerate(document.segments):
            is_speech = segment.modality == "speech"
            marked = number > 0 or not opens_bare
            inside = slice(at + marked, at + marked + len(segment.ids_T))
            if marked:
                ids_T[at] = self.marker(segment.modality)
                loss_T[at] = segment.loss and previous_loss
            ids_T[inside] = self.to_model(segment.modality, segment.ids_T)
            is_speech_T[inside] = is_speech
            loss_T[inside] = segment.loss
            if segment.unit_end_T is not None:
                unit_end_T[inside] = segment.unit_end_T
            elif is_speech and inside.stop > inside.start:
                has_ends = False
            at, previous_loss = inside.stop, segment.loss
        loss_T[at] = previous_loss
        return LaidOut(
            id=document.id,
            source=document.source,
            ids_T=ids_T,
            is_speech_T=is_speech_T,
            loss_T=loss_T,
            unit_end_T=unit_end_T if has_ends else None,
        )

    def read_back(self, ids_T: np.ndarray) -> list[Segment]:
        """Model ids -> segments, the inverse of `lay_out` up to unit ends and loss. Stops at EOS, skips BOS and PAD.

        Without `opening_marker` nothing tells of an empty text that opens the document.
        """
        segments: list[tuple[Modality, list[int]]] = []
        for i in np.asarray(ids_T).tolist():
            if i == self.eos:
                break
            if i == self.marker("text"):
                segments.append(("text", []))
            elif i == self.marker("speech"):
                segments.append(("speech", []))
            elif segments and segments[-1][0] == "text" and self.is_text(i):
                segments[-1][1].append(i)
            elif segments and segments[-1][0] == "speech" and self.is_speech(i):
                segments[-1][1].append(i - self.speech_start)
            elif not segments and not self.opening_marker and self.is_text(i):
                segments.append(("text", [i]))
            elif i not in (self.bos, self.pad):
                raise ValueError(f"id {i} stands where its modality is not open; this is not a laid-out document")
        return [Segment(modality=m, ids_T=np.asarray(x, dtype=np.int32)) for m, x in segments]

    def _opens_bare(self, document: Document) -> bool:
        """Whether the first segment is text that stands right behind BOS."""
        return bool(document.segments) and document.segments[0].modality == "text" and not self.opening_marker
