"""Parallel interleaving: a spoken document with known word places becomes text blocks and speech blocks in turn.

The blocks are drawn anew in every epoch (spec latent-speech-text, 3.2).
Trap: a silence at a switch is split. The half next to the spoken words stays, the half next to the text is dropped, so
the blocks of a document together hold fewer speech tokens than the recording.
"""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Protocol

import numpy as np

from speechquilt.config import fingerprint
from speechquilt.text import TextTokenizer
from speechquilt.types import SILENCE, AlignedTokens, AlignedWord, Document, Modality, Segment, UnitEnd

MIN_TEXT_WORDS, MAX_TEXT_WORDS = 5, 30
MAX_TEXT_SHARE = 0.6  # of the document's words, so that speech is left
MAX_FIRST_SPEECH_WORDS = 15
MIN_BLOCK_WORDS = 2
MIN_LAST_WORDS = 3  # a shorter block at the end of the document joins the one before it
KNOWN_WORDS = 1 << 17  # words whose ids or pieces are remembered

TextEncode = Callable[[str], Sequence[int]]  # gets the space before a run that does not open its document
PieceLengths = Callable[[str], Sequence[int]]  # a word -> the characters of each of its text pieces


class SpokenTexts(Protocol):
    """Spoken documents by index: a `spoken.SpokenFolder`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> AlignedTokens: ...


def tokens_of_words(alignment: Sequence[AlignedWord], num_tokens: int, frame_rate: float) -> np.ndarray:
    """-> `word_T` int32: which word each of `num_tokens` tokens at `frame_rate` Hz belongs to, SILENCE for none (spec 2, 4
    "Frames to tokens").

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
    return word_T


def draw_blocks(num_words: int, rng: np.random.Generator) -> list[tuple[Modality, int, int]]:
    """Alternating (modality, first word, end word) blocks that cover the document (spec 2, 3.2).

    Text: uniform 5-30 words, at most 0.6 of the document, at least 2. Speech after text: half as many. Speech first:
    uniform 2-15. The first modality is a fair coin. A last block of fewer than 3 words joins the one before it.
    """
    text_first = rng.random() < 0.5
    first_K = [] if text_first else [rng.integers(MIN_BLOCK_WORDS, MAX_FIRST_SPEECH_WORDS, endpoint=True)]
    most_text = max(MIN_BLOCK_WORDS, min(MAX_TEXT_WORDS, int(MAX_TEXT_SHARE * num_words)))
    least_text = min(MIN_TEXT_WORDS, most_text)
    num_pairs = num_words // (least_text + MIN_BLOCK_WORDS) + 1  # of text and speech: as many as there can be
    text_P = rng.integers(least_text, most_text, endpoint=True, size=num_pairs)
    pairs_K = np.stack([text_P, np.maximum(MIN_BLOCK_WORDS, text_P // 2)], axis=1).ravel()
    end_K = np.cumsum(np.concatenate([first_K, pairs_K]).astype(np.int64))
    ends = end_K[: np.searchsorted(end_K, num_words)].tolist()  # of the blocks that end inside the document
    if ends and num_words - ends[-1] < MIN_LAST_WORDS:
        ends.pop()
    modalities: tuple[Modality, Modality] = ("text", "speech") if text_first else ("speech", "text")
    bounds = [0, *ends, num_words] if num_words else [0]
    return [(modalities[k % 2], a, b) for k, (a, b) in enumerate(pairwise(bounds))]


def interleave_parallel(
    spoken: AlignedTokens,
    rng: np.random.Generator,
    text_encode: TextEncode,
    *,
    source: str = "parallel",
    piece_lengths: PieceLengths | None = None,
) -> Document:
    """One interleaved document from one spoken document; every block becomes a Segment, speech with its `unit_end_T`.

    A speech block none of whose words has a token (a broken alignment) is rendered as text. `piece_lengths` adds the ends
    of the text pieces inside words (`mark_pieces`).
    """
    first_W, end_W = _token_ranges(spoken)
    low_W, high_W = _with_silence(first_W, end_W, len(spoken.ids_T))
    unit_end_T = spoken.unit_end_T
    if piece_lengths is not None:
        unit_end_T = mark_pieces(unit_end_T, spoken.word_T, spoken.words, piece_lengths)
    segments = []
    for modality, a, b in _runs(draw_blocks(len(spoken.words), rng), first_W, end_W):
        if modality == "text":
            text = " ".join(spoken.words[a:b])
            ids_T = np.asarray(text_encode(f" {text}" if a else text), dtype=np.int32)
            segments.append(Segment(modality="text", ids_T=ids_T))
            continue
        part = slice(low_W[a], high_W[b - 1])
        ends_T = unit_end_T[part].copy()
        if not ends_T[-1]:  # the cut is inside a silence, or inside a word that shares its tokens
            ends_T[-1] = _ended(spoken.word_T[part.stop - 1])
        ids_T = np.asarray(spoken.ids_T[part], dtype=np.int32)
        segments.append(Segment(modality="speech", ids_T=ids_T, unit_end_T=ends_T))
    return Document(id=spoken.id, source=source, segments=tuple(segments))


def mark_pieces(
    unit_end_T: np.ndarray, word_T: np.ndarray, words: Sequence[str], piece_lengths: PieceLengths
) -> np.ndarray:
    """`unit_end_T` with UnitEnd.PIECE at the last token of every text piece inside a word (spec 2, 5 "BPE-aligned").

    Only the times of words are known, so a word's tokens are divided over its pieces in proportion to their characters:
    an approximation of the paper's alignment of characters. A piece that gets no token joins its neighbour.
    """
    token_N = np.flatnonzero(word_T != SILENCE)
    spoken_W, first_W, count_W = np.unique(word_T[token_N], return_index=True, return_counts=True)
    lengths = [piece_lengths(words[w]) for w in spoken_W.tolist()]
    num_pieces_W = np.array([len(pieces) for pieces in lengths], dtype=np.int64)
    ended_P = np.cumsum(np.array([n for pieces in lengths for n in pieces], dtype=np.int64))  # characters so far
    total_W = np.array([sum(pieces) for pieces in lengths], dtype=np.int64)
    word_P = np.repeat(np.arange(len(spoken_W)), num_pieces_W)
    inside_P = ended_P - (np.cumsum(total_W) - total_W)[word_P]
    # Rounded half up in whole numbers: how many of the word's tokens come before the end of the piece.
    tokens_P = (2 * inside_P * count_W[word_P] + total_W[word_P]) // (2 * total_W[word_P])
    ends_P = (tokens_P > 0) & (tokens_P < count_W[word_P])
    at_N = token_N[first_W[word_P[ends_P]] + tokens_P[ends_P] - 1]
    marked_T = unit_end_T.copy()
    marked_T[at_N[marked_T[at_N] == UnitEnd.NONE]] = UnitEnd.PIECE
    return marked_T


class ParallelSource:
    """Spoken documents as a mixture source whose blocks are drawn anew in every epoch, from (document id, epoch, seed)."""

    def __init__(
        self,
        spoken: SpokenTexts,
        text_encode: TextEncode,
        *,
        seed: int = 0,
        source: str = "parallel",
        piece_lengths: PieceLengths | None = None,
    ) -> None:
        self.spoken, self.text_encode, self.seed, self.source = spoken, text_encode, seed, source
        self.piece_lengths = piece_lengths

    def __len__(self) -> int:
        return len(self.spoken)

    def __getitem__(self, index: int) -> Document:
        return self.in_epoch(index, 0)

    def ids(self) -> list[str]:
        """The ids of all documents, in order."""
        ids = getattr(self.spoken, "ids", None)  # a list of texts has none
        return ids() if ids else [self.spoken[i].id for i in range(len(self))]

    def in_epoch(self, index: int, epoch: int) -> Document:
        """Document `index` as it is in this epoch."""
        spoken = self.spoken[index]
        rng = np.random.default_rng(int(fingerprint([spoken.id, epoch, self.seed]), 16))
        return interleave_parallel(spoken, rng, self.text_encode, source=self.source, piece_lengths=self.piece_lengths)


def word_by_word(tokenizer: TextTokenizer) -> TextEncode:
    """`tokenizer.encode_run` that remembers the ids of words, where the tokenizer never merges across a space.

    That is byte-level BPE which cuts at spaces first and gives a text its leading space, as ours does; any other
    tokenizer encodes every block as a whole.
    """
    stages = json.loads(tokenizer.json)
    cuts = stages["pre_tokenizer"] or {}
    prefixed = cuts.get("type") == "ByteLevel" and cuts.get("add_prefix_space") and cuts.get("use_regex", True)
    if not prefixed or stages["normalizer"] or stages["post_processor"] or stages["added_tokens"]:
        return tokenizer.encode_run
    word_ids = lru_cache(KNOWN_WORDS)(tokenizer.encode)

    def encode(text: str) -> list[int]:
        words = text.removeprefix(" ").split(" ")
        if "" in words:  # several spaces together are tokens of their own
            return tokenizer.encode(text)
        return [i for word in words for i in word_ids(word)]

    return encode


def word_pieces(tokenizer: TextTokenizer) -> PieceLengths:
    """The characters of each piece of a word that stands behind a space. A piece that is only the space has none, so it
    joins the piece behind it; a piece that is part of a character counts as one."""

    @lru_cache(KNOWN_WORDS)
    def lengths(word: str) -> tuple[int, ...]:
        found = tuple(len(tokenizer.decode([i])) for i in tokenizer.encode_inside(word))
        return found if any(found) else (1,)

    return lengths


def _runs(
    blocks: Sequence[tuple[Modality, int, int]], first_W: np.ndarray, end_W: np.ndarray
) -> list[tuple[Modality, int, int]]:
    """The blocks, with those that have no speech turned to text and joined to the text around them."""
    rendered: list[tuple[Modality, int, int]] = [
        ("text" if modality == "speech" and first_W[a] >= end_W[b - 1] else modality, a, b) for modality, a, b in blocks
    ]
    groups = ((modality, list(group)) for modality, group in groupby(rendered, key=lambda run: run[0]))
    return [(modality, group[0][1], group[-1][2]) for modality, group in groups]


def _with_silence(first_W: np.ndarray, end_W: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and end of a block that starts, or ends, with each word.

    Silence next to it: all of it at the document's ends, the nearer and larger half at a switch (spec 2, 3.2).
    """
    silence_W = first_W - np.concatenate([[0], end_W])[:-1]  # before each word
    low_W = first_W - (silence_W + 1) // 2
    high_W = end_W + (np.append(silence_W[1:], 0) + 1) // 2
    low_W[:1], high_W[-1:] = 0, num_tokens
    return low_W, high_W


def _ended(word: int) -> UnitEnd:
    return UnitEnd.SILENCE if word == SILENCE else UnitEnd.WORD


def _token_ranges(spoken: AlignedTokens) -> tuple[np.ndarray, np.ndarray]:
    """First token and end of every word; a word without a token is an empty range where the word before it ends."""
    num_words = len(spoken.words)
    token_N = np.flatnonzero(spoken.word_T != SILENCE)
    word_N = spoken.word_T[token_N]
    first_W, end_W = np.full(num_words, -1), np.zeros(num_words, dtype=np.int64)
    first_W[word_N[::-1]] = token_N[::-1]
    end_W[word_N] = token_N + 1
    end_W = np.maximum.accumulate(end_W)
    return np.where(first_W < 0, end_W, first_W), end_W
