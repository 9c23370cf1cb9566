"""Audio inside other files: rows of Parquet that hold the bytes (as the Hugging Face hub stores them), members of a tar
(WebDataset).

Trap: nothing is unpacked to the disk. A recording's path goes through the file that holds it, "shard.tar/a.flac" or
"train.parquet/17", so its name must not be believed to be a path of the file system.
"""

import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.tables import AUDIO_SUFFIXES, PATH_COLUMNS, TEXT_COLUMNS, TableRow, decoded
from speechquilt.types import Row

CONTAINERS = (".tar", ".parquet")
_OTHER_COLUMNS = ("id", "words", "start", "end", "offset", "duration")
_TEXT_NAMES = ("txt", "text", "transcript", "lab")
_LONGEST_TEXT = 1 << 24  # bytes of a text or JSON member of a tar
_BLOCK = 512  # of a tar


# --- Parquet


def parquet_rows(path: Path) -> Iterator[TableRow]:
    """The rows of a Parquet table. Where a row holds its audio, "path" leads into the file; the audio itself is not
    read.

    Raises ValueError when the file is damaged or has neither a column of paths nor one of audio.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({str(error).splitlines()[0]}); get it again") from error
    audio = audio_column(file.schema_arrow)
    known = {*PATH_COLUMNS, *TEXT_COLUMNS, *_OTHER_COLUMNS} - {audio}
    columns = [name for name in file.schema_arrow.names if name in known]
    if audio is None and not set(columns) & set(PATH_COLUMNS):
        raise ValueError(f"{path} has no column of paths ({', '.join(PATH_COLUMNS)}) and none of audio {{bytes, path}}")
    number = 0
    for batch in file.iter_batches(
        columns=[*columns, *([f"{audio}.path"] if audio and _has_path(file, audio) else [])]
    ):
        for values in batch.to_pylist():
            if audio is not None:
                named = (values.pop(audio, None) or {}).get("path")
                values = {"id": values.get("id") or named, **values, "path": f"{path.name}/{number}"}
            yield TableRow(where=f"{path.name} row {number}", values=values)
            number += 1


def audio_column(schema: pa.Schema) -> str | None:
    """The column of structs with `bytes`: what `datasets.Audio` is stored as."""
    for name, type in zip(schema.names, schema.types):
        if pa.types.is_struct(type) and "bytes" in [type.field(i).name for i in range(type.num_fields)]:
            return name
    return None


def is_speech_parquet(path: Path) -> bool:
    """Whether a Parquet file has a column of paths or of audio; reads the footer."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return True  # the reader says what is wrong with it
    return audio_column(schema) is not None or bool(set(schema.names) & set(PATH_COLUMNS))


def _has_path(file: pq.ParquetFile, audio: str) -> bool:
    type = file.schema_arrow.field(audio).type
    return "path" in [type.field(i).name for i in range(type.num_fields)]


def _parquet_bytes(path: Path, row: int) -> bytes | str:
    """The audio of a row, or the path that stands in its place."""
    starts, audio = _groups(path)
    group = max(g for g, start in enumerate(starts[:-1]) if start <= row) if row < starts[-1] else -1
    if group < 0:
        raise BrokenAudio("missing file", f"{path.name} has {starts[-1]} rows, there is no row {row}")
    cell = _group_of(path, group, audio)[row - starts[group]].as_py() or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if cell.get("path"):
        return str(cell["path"])
    raise BrokenAudio("no audio in this row", "neither bytes nor a path")


@functools.lru_cache(maxsize=64)
def _groups(path: Path) -> tuple[list[int], str]:
    """Where each row group starts, with the number of rows behind the last; and the column of audio."""
    file = pq.ParquetFile(path)
    starts = [0]
    for g in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(g).num_rows)
    audio = audio_column(file.schema_arrow)
    if audio is None:
        raise BrokenAudio("missing file", f"{path.name} has no column of audio {{bytes, path}}")
    return starts, audio


@functools.lru_cache(maxsize=2)  # recordings are read in order, by a few threads that are near each other
def _group_of(path: Path, group: int, audio: str) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[audio]).column(0)


# --- tar


@dataclass
class _Sample:
    """Members of one name: its audio and what is known of it."""

    key: str
    audio: tarfile.TarInfo | None = None
    values: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


def tar_rows(path: Path) -> Iterator[TableRow]:
    """The samples of a WebDataset archive: members of one name up to its first point, one of them audio, others text or
    JSON.

    Nothing is written anywhere. What is unsafe, or of no use, is a row with a fault; so is the end of a truncated
    archive, behind its good samples.
    """
    size = path.stat().st_size
    sample: _Sample | None = None
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir() or PurePosixPath(member.name).name.startswith("._"):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key, suffix = _key(member.name)
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield _tar_row(path, sample)
                    sample = _Sample(key)
                _add(sample, archive, member, suffix)
            whole = _ends_well(path, archive.offset)
    except (tarfile.TarError, OSError) as error:
        whole, why = False, str(error)
    else:
        why = "its end is missing"
    if sample is not None:
        yield _tar_row(path, sample)
    if not whole:
        where = f"{path.name} behind {sample.key if sample else 'its start'}"
        yield TableRow(where=where, values={}, fault="damaged archive", detail=f"{why}; get it again")


def _key(name: str) -> tuple[str, str]:
    """ "a/b.seg1.flac" -> ("a/b", "seg1.flac"), as WebDataset has it."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _add(sample: _Sample, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> None:
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        sample.fault = ("unsafe name in an archive", f"{member.name!r} is absolute or leads out of it; pack it again")
    elif not member.isfile():
        sample.fault = (
            "not a plain file in an archive",
            f"{member.name!r} is a link or a device; pack the file itself",
        )
    elif f".{suffix.rpartition('.')[2]}" in AUDIO_SUFFIXES:
        sample.audio = sample.audio or member
    elif suffix in (*_TEXT_NAMES, "json") and member.size <= _LONGEST_TEXT:
        file = archive.extractfile(member)
        assert file is not None  # a plain file
        try:
            _add_text(sample, file.read(), suffix)
        except ValueError as error:
            sample.values["text_fault"] = ("not UTF-8 or not JSON", f"{member.name}: {error}")


def _add_text(sample: _Sample, data: bytes, suffix: str) -> None:
    text = decoded(data)
    if suffix != "json":
        sample.values["text"] = text.strip()
        return
    values = json.loads(text)
    if isinstance(values, Mapping):
        wanted = {*TEXT_COLUMNS, *_OTHER_COLUMNS} - {"id", "start", "end", "offset"}  # of the recording it was cut from
        sample.values |= {k: v for k, v in values.items() if k in wanted}


def _tar_row(path: Path, sample: _Sample) -> TableRow:
    where = f"{path.name} {sample.key}"
    if sample.fault is None and sample.audio is None:
        sample.fault = ("a sample without audio", f"none of its members ends in {', '.join(sorted(AUDIO_SUFFIXES))}")
    if sample.fault is not None:
        return TableRow(where=where, values={}, fault=sample.fault[0], detail=sample.fault[1])
    assert sample.audio is not None
    at = [sample.audio.offset_data, sample.audio.size]
    name = f"{path.name}/{sample.audio.name.removeprefix('./')}"
    return TableRow(where=where, values={**sample.values, "path": name, "id": name, "at": at})


def _ends_well(path: Path, offset: int) -> bool:
    """Whether a block of zeros, the mark of an archive's end, stands where its last member ends."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _tar_bytes(path: Path, name: str) -> bytes:
    place = _tar_index(path).get(name)
    if place is None:
        raise BrokenAudio("missing file", f"{path.name} has no member {name!r}")
    return _slice(path, *place)


@functools.lru_cache(maxsize=16)
def _tar_index(path: Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    found[member.name.removeprefix("./")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not found:
            raise BrokenAudio("damaged archive", f"{path.name}: {error}; get it again") from error
    return found


def _slice(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


# --- both


def inside(path: Path, row: Row) -> io.BytesIO | Path | None:
    """The audio at a path that leads through a container; where the container only names a file, that file's path. None
    when no part of the path is a container. Raises BrokenAudio when it holds no such audio.
    """
    for container in path.parents:
        if container.suffix in CONTAINERS and os.path.isfile(container):
            name = path.relative_to(container).as_posix()
            if container.suffix == ".tar":
                return io.BytesIO(_slice(container, *row["at"]) if row.get("at") else _tar_bytes(container, name))
            if not name.isdecimal():
                raise BrokenAudio("missing file", f"{name!r} is no row of {container.name}")
            found = _parquet_bytes(container, int(name))
            return io.BytesIO(found) if isinstance(found, bytes) else container.parent / found
        if os.path.isdir(container):
            return None
    return None
