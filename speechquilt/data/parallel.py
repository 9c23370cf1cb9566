"""Parallel interleaving: a spoken document with known word places becomes text blocks and speech blocks in turn.

Place in the pipeline: reads aligned, tokenised speech; gives the mixture documents that differ in every epoch. Spec 2, 3.2.
Trap: a silence at a switch is split. The half next to the spoken words stays, the half next to the text is dropped, so the
blocks of a document together hold fewer speech tokens than the recording.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from speechquilt.config import fingerprint
from speechquilt.types import AlignedWord, Document, Modality, Segment, UnitEnd

SILENCE = -1  # word index of a token that belongs to no word
MIN_TEXT_WORDS, MAX_TEXT_WORDS = 5, 30
MAX_TEXT_SHARE = 0.6  # of the document's words, so that speech is left
MAX_FIRST_SPEECH_WORDS = 15
MIN_BLOCK_WORDS = 2
MIN_LAST_WORDS = 3  # a shorter block at the end of the document joins the one before it


@dataclass(frozen=True, kw_only=True)
class TokenWords:
    """`word_T` int32: the word each speech token belongs to, SILENCE for none; `unit_end_T` as in `types.Segment`."""

    word_T: np.ndarray
    unit_end_T: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SpokenText:
    """A spoken document: its words, its speech tokens (local ids) and the word of each token (`tokens_of_words`)."""

    id: str
    words: tuple[str, ...]
    ids_T: np.ndarray
    word_T: np.ndarray

    def __post_init__(self) -> None:
        if len(self.ids_T) != len(self.word_T):
            raise ValueError(f"{self.id}: {len(self.ids_T)} speech tokens but {len(self.word_T)} word indices")
        spoken = self.word_T[self.word_T != SILENCE]
        if len(spoken) and (spoken.min() < 0 or spoken.max() >= len(self.words) or (np.diff(spoken) < 0).any()):
            raise ValueError(
                f"{self.id}: word_T must rise from 0 to {len(self.words) - 1} between silences ({SILENCE})"
            )


def tokens_of_words(alignment: Sequence[AlignedWord], num_tokens: int, frame_rate: float) -> TokenWords:
    """Which word each of `num_tokens` tokens at `frame_rate` Hz belongs to (spec 2, 4 "Frames to tokens").

    A token belongs to the word whose interval holds the token's centre. A word without a token takes the nearest silence
    token between its neighbours' tokens; when there is none it goes without, inside its neighbour's tokens.
    Raises ValueError when the words are not in time order.
    """
    start_W = np.array([word.start_s for word in alignment])
    end_W = np.array([word.end_s for word in alignment])
    if (np.diff(start_W) < 0).any():
        k = int(np.argmax(np.diff(start_W) < 0))
        raise ValueError(f"word {alignment[k + 1].text!r} starts before the word in front of it; sort the alignment")
    word_T = np.full(num_tokens, SILENCE, dtype=np.int32)
    if len(alignment) and num_tokens:
        centre_T = (np.arange(num_tokens) + 0.5) / frame_rate
        last_started_T = np.searchsorted(start_W, centre_T, side="right") - 1
        inside_T = (last_started_T >= 0) & (centre_T < end_W[last_started_T])
        word_T[inside_T] = last_started_T[inside_T]
        for word in np.setdiff1d(np.arange(len(alignment)), word_T):
            before, after = np.flatnonzero((word_T >= 0) & (word_T < word)), np.flatnonzero(word_T > word)
            low = before[-1] + 1 if len(before) else 0
            high = after[0] if len(after) else num_tokens
            if low < high:  # only silence lies between the neighbours
                centre = (start_W[word] + end_W[word]) / 2
                word_T[low + np.argmin(np.abs(centre_T[low:high] - centre))] = word
    return TokenWords(word_T=word_T, unit_end_T=_unit_ends(word_T))


def draw_blocks(num_words: int, rng: np.random.Generator) -> list[tuple[Modality, int, int]]:
    """Alternating (modality, first word, end word) blocks that cover the document (spec 2, 3.2).

    Text: uniform 5-30 words, at most 0.6 of the document, at least 2. Speech after text: half as many. Speech first:
    uniform 2-15. The first modality is a fair coin. A last block of fewer than 3 words joins the one before it.
    """
    blocks: list[tuple[Modality, int, int]] = []
    most_text = max(MIN_BLOCK_WORDS, min(MAX_TEXT_WORDS, int(MAX_TEXT_SHARE * num_words)))
    modality: Modality = "text" if rng.random() < 0.5 else "speech"
    done = length = 0
    while done < num_words:
        if modality == "text":
            length = int(rng.integers(min(MIN_TEXT_WORDS, most_text), most_text, endpoint=True))
        elif blocks:
            length = max(MIN_BLOCK_WORDS, length // 2)
        else:
            length = int(rng.integers(MIN_BLOCK_WORDS, MAX_FIRST_SPEECH_WORDS, endpoint=True))
        end = min(done + length, num_words)
        if blocks and end == num_words and end - done < MIN_LAST_WORDS:
            blocks[-1] = (blocks[-1][0], blocks[-1][1], end)
        else:
            blocks.append((modality, done, end))
        done = end
        modality = "speech" if modality == "text" else "text"
    return blocks


def interleave_parallel(
    spoken: SpokenText,
    rng: np.random.Generator,
    text_encode: Callable[[str], Sequence[int]],
    *,
    source: str = "parallel",
) -> Document:
    """One interleaved document from one spoken document; every block becomes a Segment, speech with its `unit_end_T`.

    A speech block none of whose words has a token (a broken alignment) is rendered as text.
    """
    first_W, end_W = _token_ranges(spoken)
    runs: list[tuple[Modality, int, int]] = [
        ("text" if modality == "speech" and first_W[a] >= end_W[b - 1] else modality, a, b)
        for modality, a, b in draw_blocks(len(spoken.words), rng)
    ]
    segments = []
    for modality, group in groupby(runs, key=lambda run: run[0]):
        members = list(group)
        a, b = members[0][1], members[-1][2]
        if modality == "text":
            ids_T = np.asarray(text_encode(" ".join(spoken.words[a:b])), dtype=np.int32)
            segments.append(Segment(modality="text", ids_T=ids_T))
            continue
        # Silence next to the block: all of it at the document's ends, the nearer and larger half at a switch.
        low = first_W[a] - _half(first_W[a] - end_W[a - 1]) if a else 0
        high = end_W[b - 1] + _half(first_W[b] - end_W[b - 1]) if b < len(spoken.words) else len(spoken.ids_T)
        segments.append(
            Segment(
                modality="speech",
                ids_T=np.asarray(spoken.ids_T[low:high], dtype=np.int32),
                unit_end_T=_unit_ends(spoken.word_T[low:high]),
            )
        )
    return Document(id=spoken.id, source=source, segments=tuple(segments))


class ParallelSource:
    """Spoken documents as a mixture source whose blocks are drawn anew in every epoch, from (document id, epoch, seed)."""

    def __init__(
        self,
        spoken: Sequence[SpokenText],
        text_encode: Callable[[str], Sequence[int]],
        *,
        seed: int = 0,
        source: str = "parallel",
    ) -> None:
        self.spoken, self.text_encode, self.seed, self.source = spoken, text_encode, seed, source

    def __len__(self) -> int:
        return len(self.spoken)

    def __getitem__(self, index: int) -> Document:
        return self.in_epoch(index, 0)

    def in_epoch(self, index: int, epoch: int) -> Document:
        """Document `index` as it is in this epoch."""
        spoken = self.spoken[index]
        rng = np.random.default_rng(int(fingerprint([spoken.id, epoch, self.seed]), 16))
        return interleave_parallel(spoken, rng, self.text_encode, source=self.source)


def _half(num_tokens: int) -> int:
    return (num_tokens + 1) // 2


def _unit_ends(word_T: np.ndarray) -> np.ndarray:
    """`UnitEnd` codes: the last token of every word and of every maximal run of silence."""
    ends_T = np.ones(len(word_T), dtype=bool)
    ends_T[:-1] = word_T[1:] != word_T[:-1]
    kind_T = np.where(word_T == SILENCE, UnitEnd.SILENCE, UnitEnd.WORD)
    return np.where(ends_T, kind_T, UnitEnd.NONE).astype(np.uint8)


def _token_ranges(spoken: SpokenText) -> tuple[np.ndarray, np.ndarray]:
    """First token and end of every word; a word without a token is an empty range where the word before it ends."""
    num_words = len(spoken.words)
    token_N = np.flatnonzero(spoken.word_T != SILENCE)
    word_N = spoken.word_T[token_N]
    first_W, end_W = np.full(num_words, -1), np.zeros(num_words, dtype=np.int64)
    first_W[word_N[::-1]] = token_N[::-1]
    end_W[word_N] = token_N + 1
    end_W = np.maximum.accumulate(end_W)
    return np.where(first_W < 0, end_W, first_W), end_W
