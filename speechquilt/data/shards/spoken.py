"""Shards of spoken texts: words, speech tokens and the word of each token, before anything was cut into blocks.

Blocks are cut when the shards are loaded, so that every epoch draws others (spec latent-speech-text, 3.2).
Trap: these shards hold no text tokens. The words are spelled with the text tokenizer that the run brings.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from speechquilt.data.shards.documents import ShardFolder
from speechquilt.data.shards.parquet import ItemFolder, ItemWriter, ShardKind, kind_of
from speechquilt.types import AlignedTokens


class _Spoken:
    """One shard as flat arrays and offsets."""

    def __init__(self, column: dict[str, Any]) -> None:
        self._id, self._text, self._words = column["id"], column["text"], column["words"]
        self._starts = column["ids"].offsets.to_numpy()
        self._ids, self._word = column["ids"].values.to_numpy(), column["word"].values.to_numpy()

    def __call__(self, row: int) -> AlignedTokens:
        tokens = slice(self._starts[row], self._starts[row + 1])
        return AlignedTokens(
            id=self._id[row].as_py(),
            text=self._text[row].as_py(),
            words=tuple(self._words[row].as_py()),
            ids_T=self._ids[tokens],
            word_T=self._word[tokens],
        )


def _columns(spoken: list[AlignedTokens]) -> dict[str, list[Any]]:
    return {
        "id": [s.id for s in spoken],
        "words": [list(s.words) for s in spoken],
        "ids": [np.asarray(s.ids_T, dtype=np.int32) for s in spoken],
        "word": [np.asarray(s.word_T, dtype=np.int32) for s in spoken],
    }


SPOKEN = ShardKind[AlignedTokens](
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


class SpokenWriter(ItemWriter[AlignedTokens]):
    """Writes spoken texts."""

    kind = SPOKEN


class SpokenFolder(ItemFolder[AlignedTokens]):
    """Reads spoken texts."""

    kind = SPOKEN


def open_shards(folder: Path, *, mapped: bool = False) -> ShardFolder | SpokenFolder:
    """A finished folder of either kind. Raises FileNotFoundError or ValueError as the two do."""
    return (SpokenFolder if kind_of(folder) == SPOKEN.name else ShardFolder)(folder, mapped=mapped)
