"""Shards of spoken texts: words, speech tokens and the word of each token, before anything was cut into blocks.

Place in the pipeline: what parallel interleaving reads at load time, so that every epoch draws other blocks (spec 2, 3.2).
Trap: these shards hold no text tokens. The words are spelled with the text tokenizer that the run brings.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from speechquilt.data.parallel import SILENCE, ParallelSource, PieceLengths, SpokenText, SpokenTexts, TextEncode
from speechquilt.data.shards import ItemFolder, ItemWriter, ShardFolder, ShardKind, kind_of


class _Spoken:
    """One shard as flat arrays and offsets."""

    def __init__(self, column: dict[str, Any]) -> None:
        self._id, self._words = column["id"], column["words"]
        self._starts = column["ids"].offsets.to_numpy()
        self._ids, self._word = column["ids"].values.to_numpy(), column["word"].values.to_numpy()

    def __call__(self, row: int) -> SpokenText:
        tokens = slice(self._starts[row], self._starts[row + 1])
        return SpokenText(
            id=self._id[row].as_py(),
            words=tuple(self._words[row].as_py()),
            ids_T=self._ids[tokens],
            word_T=self._word[tokens],
        )


def _columns(spoken: list[SpokenText]) -> dict[str, list[Any]]:
    return {
        "id": [s.id for s in spoken],
        "words": [list(s.words) for s in spoken],
        "ids": [np.asarray(s.ids_T, dtype=np.int32) for s in spoken],
        "word": [np.asarray(s.word_T, dtype=np.int32) for s in spoken],
    }


SPOKEN = ShardKind[SpokenText](
    name="spoken texts",
    schema=pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("words", pa.list_(pa.string()), nullable=False),
            pa.field("ids", pa.list_(pa.int32()), nullable=False),
            pa.field("word", pa.list_(pa.int32()), nullable=False),  # of each id, -1 for silence; as long as ids
            pa.field("text", pa.string(), nullable=False),
        ]
    ),
    columns=_columns,
    open=_Spoken,
    ids_of=lambda spoken: [("speech", np.asarray(spoken.ids_T))],
)


class SpokenWriter(ItemWriter[SpokenText]):
    """Writes spoken texts."""

    kind = SPOKEN


class SpokenFolder(ItemFolder[SpokenText]):
    """Reads spoken texts."""

    kind = SPOKEN


def open_shards(folder: Path, *, mapped: bool = False) -> ShardFolder | SpokenFolder:
    """A finished folder of either kind. Raises FileNotFoundError or ValueError as the two do."""
    return (SpokenFolder if kind_of(folder) == SPOKEN.name else ShardFolder)(folder, mapped=mapped)


@dataclass(frozen=True, kw_only=True)
class JoinConfig:
    """Which spoken texts become one document (spec 2, 3.2: utterances of 10 to 20 s give only two or three blocks).

    `max_tokens`: most speech tokens of a document, 120 s in the spec; 0 joins nothing. `session`: a regular expression whose
    first group is the recording or session in an id, "speaker-chapter" of "speaker-chapter-0001" by default; other ids stay alone.
    Raises ValueError on a value out of range.
    """

    max_tokens: int = 0
    session: str = r"(.+)[-_/]\d+"

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"join.max_tokens={self.max_tokens} must be at least 0, where 0 joins nothing")
        try:
            groups = re.compile(self.session).groups
        except re.error as error:
            raise ValueError(f"join.session={self.session!r} is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"join.session={self.session!r} needs a group, the part of an id that names its session")


class JoinedTexts:
    """Spoken texts in which neighbours of one session are one, as many as `max_tokens` allows; a longer one stays whole.

    They are read once to learn their ids and lengths. Session ends are never crossed, and the order stays.
    """

    def __init__(self, spoken: SpokenTexts, config: JoinConfig) -> None:
        self.spoken = spoken
        self._starts: list[int] = []  # of each document, and the end of the last
        session, tokens = None, 0
        for index in range(len(spoken)):
            item = spoken[index]
            found = re.fullmatch(config.session, item.id)
            name = found[1] if found else None
            tokens += len(item.ids_T)
            if name is None or name != session or tokens > config.max_tokens:
                self._starts.append(index)
                session, tokens = name, len(item.ids_T)
        self._starts.append(len(spoken))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> SpokenText:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        parts = [self.spoken[n] for n in range(self._starts[index], self._starts[index + 1])]
        first_word = accumulate((len(part.words) for part in parts[:-1]), initial=0)
        word_T = [np.where(p.word_T == SILENCE, SILENCE, p.word_T + first) for p, first in zip(parts, first_word)]
        return SpokenText(
            id=parts[0].id if len(parts) == 1 else f"{parts[0].id}+{len(parts) - 1}",
            words=tuple(word for part in parts for word in part.words),
            ids_T=np.concatenate([part.ids_T for part in parts]),
            word_T=np.concatenate(word_T).astype(np.int32),
        )


def as_documents(
    shards: ShardFolder | SpokenFolder,
    text_encode: TextEncode,
    *,
    seed: int = 0,
    source: str = "parallel",
    piece_lengths: PieceLengths | None = None,
    join: JoinConfig = JoinConfig(),
) -> ShardFolder | ParallelSource:
    """What a mixture reads from a folder: documents as they are, spoken texts (joined) interleaved anew in every epoch."""
    if isinstance(shards, ShardFolder):
        return shards
    spoken = JoinedTexts(shards, join) if join.max_tokens else shards
    return ParallelSource(spoken, text_encode, seed=seed, source=source, piece_lengths=piece_lengths)
