"""Shards of aligned recordings, and the metadata.jsonl that is made of them.

Every reader of a folder of speech takes the metadata.jsonl.
Trap: a path is relative to the corpus that was aligned. In metadata.jsonl it is relative to the folder of that file, as
its readers expect, so the folder with the metadata moves only together with the audio.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from speechquilt.data.shards.parquet import ItemFolder, ItemWriter, ShardKind
from speechquilt.types import AlignedWord

METADATA = "metadata.jsonl"
_DIGITS = 4  # a tenth of a millisecond


@dataclass(frozen=True, kw_only=True)
class AlignedRecording:
    """What became of one recording; `words` in its text's own spelling, in seconds from its start. `start_s`, `end_s`: the part of the
    file that it is, None for all of it."""

    id: str
    path: str
    text: str
    duration_s: float
    words: tuple[AlignedWord, ...]
    start_s: float | None = None
    end_s: float | None = None


class _Recordings:
    """One shard."""

    def __init__(self, column: dict[str, Any]) -> None:
        self._column = column

    def __call__(self, row: int) -> AlignedRecording:
        values = {name: self._column[name][row].as_py() for name in ALIGNED.schema.names}
        return AlignedRecording(**values | {"words": tuple(AlignedWord(**word) for word in values["words"])})


def _columns(recordings: list[AlignedRecording]) -> dict[str, list[Any]]:
    return {
        "id": [r.id for r in recordings],
        "path": [r.path for r in recordings],
        "duration_s": [r.duration_s for r in recordings],
        "words": [[_rounded(word) for word in r.words] for r in recordings],
        "start_s": [r.start_s for r in recordings],
        "end_s": [r.end_s for r in recordings],
    }


def _rounded(word: AlignedWord) -> dict[str, Any]:
    times = {"start_s": word.start_s, "end_s": word.end_s, "score": word.score}
    return {"text": word.text, **{key: round(value, _DIGITS) for key, value in times.items()}}


_WORD = pa.struct([("text", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64()), ("score", pa.float64())])
ALIGNED = ShardKind[AlignedRecording](
    name="aligned recordings",
    schema=pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("duration_s", pa.float64(), nullable=False),
            pa.field("words", pa.list_(_WORD), nullable=False),
            pa.field("start_s", pa.float64()),
            pa.field("end_s", pa.float64()),
            pa.field("text", pa.string(), nullable=False),
        ]
    ),
    columns=_columns,
    open=_Recordings,
    ids_of=lambda recording: (),
)


class AlignedWriter(ItemWriter[AlignedRecording]):
    """Writes aligned recordings."""

    kind = ALIGNED


class AlignedFolder(ItemFolder[AlignedRecording]):
    """Reads aligned recordings."""

    kind = ALIGNED


def write_metadata(folder: Path, root: Path, recordings: Iterable[AlignedRecording]) -> None:
    """`folder`/metadata.jsonl, whole or not at all: a row per recording, its audio found from there through `root`."""
    from_folder = os.path.relpath(
        root.resolve(), folder.resolve()
    )  # ".." leads out of a link's target, not of the link
    temporary = folder / f"{METADATA}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for recording in recordings:
            file.write(json.dumps(_row(recording, from_folder), ensure_ascii=False) + "\n")
    temporary.replace(folder / METADATA)


def _row(recording: AlignedRecording, root: str) -> dict[str, Any]:
    """Word times of a part count from the start of its file, as its own times do."""
    start_s = recording.start_s or 0.0
    part = {} if recording.end_s is None else {"start": start_s, "end": recording.end_s}
    return {
        "file_name": os.path.normpath(os.path.join(root, recording.path)),
        "id": recording.id,
        "text": recording.text,
        **part,
        "duration": round(recording.duration_s, _DIGITS),
        "words": [[w.text, _from_file(w.start_s, start_s), _from_file(w.end_s, start_s)] for w in recording.words],
    }


def _from_file(time_s: float, start_s: float) -> float:
    return round(time_s + start_s, _DIGITS) if start_s else time_s
