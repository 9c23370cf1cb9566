"""Shards of Documents: what a language model is trained on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from speechquilt.data.shards.parquet import ItemFolder, ItemWriter, ShardKind
from speechquilt.types import Document, Segment


class _Documents:
    """One shard of documents as flat arrays and offsets, so that a document is a few slices."""

    def __init__(self, column: dict[str, Any]) -> None:
        self._id, self._source = column["id"], column["source"]
        self._segment_starts = column["ids"].offsets.to_numpy()
        self._speech = np.asarray(column["modality"].values.to_pylist(), dtype=object) == "speech"
        self._loss = column["loss"].values.to_numpy(zero_copy_only=False)
        ids, ends = column["ids"].values, column["unit_end"].values
        self._id_starts, self._ids = ids.offsets.to_numpy(), ids.values.to_numpy()
        self._end_starts, self._ends = ends.offsets.to_numpy(), ends.values.to_numpy()
        self._has_ends = ends.is_valid().to_numpy(zero_copy_only=False)

    def __call__(self, row: int) -> Document:
        first, last = self._segment_starts[row], self._segment_starts[row + 1]
        return Document(
            id=self._id[row].as_py(),
            source=self._source[row].as_py(),
            segments=tuple(self._segment(s) for s in range(first, last)),
        )

    def _segment(self, s: int) -> Segment:
        return Segment(
            modality="speech" if self._speech[s] else "text",
            ids_T=self._ids[self._id_starts[s] : self._id_starts[s + 1]],
            unit_end_T=self._ends[self._end_starts[s] : self._end_starts[s + 1]] if self._has_ends[s] else None,
            loss=bool(self._loss[s]),
        )


def _document_columns(documents: list[Document]) -> dict[str, list[Any]]:
    return {
        "id": [d.id for d in documents],
        "source": [d.source for d in documents],
        "modality": [[s.modality for s in d.segments] for d in documents],
        "ids": [[np.asarray(s.ids_T, dtype=np.int32) for s in d.segments] for d in documents],
        "unit_end": [
            [None if s.unit_end_T is None else np.asarray(s.unit_end_T, dtype=np.uint8) for s in d.segments]
            for d in documents
        ],
        "loss": [[s.loss for s in d.segments] for d in documents],
    }


DOCUMENTS = ShardKind[Document](
    name="documents",
    schema=pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("modality", pa.list_(pa.string()), nullable=False),
            pa.field("ids", pa.list_(pa.list_(pa.int32())), nullable=False),
            pa.field("unit_end", pa.list_(pa.list_(pa.uint8())), nullable=False),  # UnitEnd; inner null: unknown
            pa.field("loss", pa.list_(pa.bool_()), nullable=False),
            pa.field("text", pa.string(), nullable=False),
        ]
    ),
    columns=_document_columns,
    open=_Documents,
    ids_of=lambda document: [(s.modality, np.asarray(s.ids_T)) for s in document.segments],
)


class ShardWriter(ItemWriter[Document]):
    """Writes Documents."""

    kind = DOCUMENTS


class ShardFolder(ItemFolder[Document]):
    """Reads Documents."""

    kind = DOCUMENTS


def read_documents(folder: Path) -> Iterator[Document]:
    """All documents of a finished folder, in order."""
    return ShardFolder(folder).in_order()
