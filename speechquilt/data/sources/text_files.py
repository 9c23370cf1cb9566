"""Text corpora of any size as slices: where the text lies, cut into equal shares of work, and the documents of one
slice.

A slice is plain JSON and small; the text itself is read by the worker that does the slice, so a list of slices never
holds a corpus.
Trap: a document without an id of its own is named by its place in its file (byte or row), so the names are the same
however the files are sliced, but not after a file has changed.
"""

import codecs
import gzip
import importlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from speechquilt.data.sources.folders import storable, walk
from speechquilt.data.sources.tables import decoded
from speechquilt.data.sources.text_parts import parts
from speechquilt.types import Reject, TextDocument

SLICE_BYTES = 4 * 2**20
MAX_WORDS = 2000  # about 5,000 tokens once a third of them is speech: a part fits into the papers' 8,192
HUB = "hub:"
_TEXTS, _LINES, _PACKED_LINES = (
    (".md", ".rst", ".txt"),
    (".jsonl",),
    (".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"),
)
_SUFFIXES = (*_TEXTS, *_LINES, *_PACKED_LINES, ".parquet", ".arrow")
_BARE = re.compile(r"[^.]+(?:-\d+(?:\.\d+)+)?")  # LICENSE, GPL-3, Apache-2.0: a version is no suffix
_HEAD_BYTES = 2**16  # of a file without a suffix, by which it is judged to be text
LONGEST_LINE = 2**28  # bytes of one line, which is held in memory a few times
_ROWS = 256  # rows of a Parquet file in memory at once

Slice = dict[str, Any]


class Read(NamedTuple):
    """One document of a slice, or why there is none, and the share of the slice that has been read with it, 0 to 1."""

    found: TextDocument | Reject
    share: float


@dataclass(frozen=True, kw_only=True)
class TextReader:
    """Reads the documents of a slice. A column `id`, when there is one, names them."""

    root: str
    """Folder that the paths of slices are relative to."""
    text_column: str = "text"
    """Key or column that holds the text."""
    max_words: int = MAX_WORDS
    """A document of more words comes as several of at most this many."""

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise ValueError(f"max_words={self.max_words} must be at least 1")

    def read(self, piece: Slice) -> Iterator[Read]:
        """The documents of a slice in order; what is broken is a Reject. Raises OSError when a file cannot be opened."""
        for found, share in _READERS[piece["kind"]](self, piece):
            if isinstance(found, Reject):
                yield Read(found, share)
            else:
                yield from (Read(part, share) for part in parts(found, self.max_words))

    def _texts(self, piece: Slice) -> Iterator[Read]:
        for number, name in enumerate(piece["paths"], 1):
            try:
                text = decoded(self._path(name).read_bytes())
                found = _reject(name, "NUL characters in the text") if "\0" in text else _document(name, None, text)
            except UnicodeDecodeError:
                found = _reject(name, "not UTF-8")
            yield Read(found, number / len(piece["paths"]))

    def _lines(self, piece: Slice) -> Iterator[Read]:
        """The lines that begin in [start, stop); listing has put both behind a newline."""
        start, stop = piece["start"], piece["stop"]
        with self._path(piece["path"]).open("rb") as file:
            file.seek(start)
            place = start
            while place < stop and (line := file.readline(LONGEST_LINE)):
                size = len(line) + _skipped(file, line)
                if line.strip():
                    yield Read(self._line(piece["path"], place, line), (place + size - start) / (stop - start))
                place += size

    def _packed_lines(self, piece: Slice) -> Iterator[Read]:
        """A whole compressed file; `place` counts the bytes of what was packed."""
        path = self._path(piece["path"])
        place, size = 0, max(1, path.stat().st_size)
        with path.open("rb") as packed:
            lines = _unpacked(packed, path.suffix)
            while True:
                try:
                    line = lines.readline(LONGEST_LINE)
                    size_of_line = len(line) + _skipped(lines, line)
                except (OSError, EOFError, zlib.error) as error:
                    _raise_if_of_the_machine(error)
                    yield Read(_damaged(f"{piece['path']}@{place}"), 1.0)
                    return
                if not line:
                    return
                if line.strip():
                    yield Read(self._line(piece["path"], place, line), packed.tell() / size)
                place += size_of_line

    def _line(self, name: str, place: int, line: bytes) -> TextDocument | Reject:
        id = f"{name}@{place}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            return _reject(id, "line too long")
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return _reject(id, "not UTF-8")
        except (ValueError, RecursionError):
            return _reject(id, "not JSON")
        if not isinstance(row, dict) or self.text_column not in row:
            return _reject(id, f"no `{self.text_column}`")
        return _document(id, row.get("id"), row[self.text_column])

    def _parquet(self, piece: Slice) -> Iterator[Read]:
        try:
            file = pq.ParquetFile(self._path(piece["path"]))
            batches = file.iter_batches(
                batch_size=_ROWS, row_groups=[piece["group"]], columns=self._columns(file.schema_arrow)
            )
            yield from self._rows(piece, batches, piece["group_start"])
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_the_machine(error)
            yield Read(_damaged(f"{piece['path']}:{piece['start']}"), 1.0)

    def _arrow(self, piece: Slice) -> Iterator[Read]:
        try:
            with pa.memory_map(str(self._path(piece["path"]))) as file:
                stream = pa.ipc.open_stream(file)
                columns = self._columns(stream.schema)
                yield from self._rows(piece, (batch.select(columns) for batch in stream), 0)
        except (pa.ArrowException, OSError) as error:
            _raise_if_of_the_machine(error)
            yield Read(_damaged(f"{piece['path']}:{piece['start']}"), 1.0)

    def _rows(self, piece: Slice, batches: Iterator[pa.RecordBatch], first: int) -> Iterator[Read]:
        """Rows [start, stop) of a file whose row `first` is the first of `batches`."""
        start, stop = piece["start"], piece["stop"]
        for batch in batches:
            wanted = batch.slice(max(0, start - first), max(0, min(stop, first + len(batch)) - max(start, first)))
            for k in range(len(wanted)):
                row = max(start, first) + k
                found = self._row(wanted, k, f"{piece['path']}:{row}")
                yield Read(found, (row + 1 - start) / (stop - start))
            first += len(batch)
            if first >= stop:
                return

    def _row(self, rows: pa.RecordBatch, k: int, name: str) -> TextDocument | Reject:
        try:
            id = rows.column("id")[k].as_py() if "id" in rows.schema.names else None
            text = rows.column(self.text_column)[k].as_py()
        except UnicodeDecodeError:
            return _reject(name, "not UTF-8")
        return _document(name, id, text)

    def _columns(self, schema: pa.Schema) -> list[str]:
        return [name for name in dict.fromkeys([self.text_column, "id"]) if name in schema.names]

    def _path(self, name: str) -> Path:
        return Path(self.root) / name

    def _nothing(self, piece: Slice) -> Iterator[Read]:
        yield Read(_reject(piece["path"], piece["reject"]), 1.0)


_READERS = {
    "texts": TextReader._texts,
    "lines": TextReader._lines,
    "packed lines": TextReader._packed_lines,
    "parquet": TextReader._parquet,
    "arrow": TextReader._arrow,
    "reject": TextReader._nothing,
}


@dataclass(frozen=True, kw_only=True)
class TextCorpus:
    """Files of text in the order of their names, all below `root`."""

    root: Path
    files: tuple[Path, ...]

    def slices(self, *, text_column: str = "text", slice_bytes: int = SLICE_BYTES) -> Iterator[Slice]:
        """All slices of about `slice_bytes` of text each, in order; reads footers and line ends, no text.

        Raises ValueError when a table has no `text_column`.
        """
        if slice_bytes < 1:
            raise ValueError(f"slice_bytes={slice_bytes} must be at least 1")
        small = _SmallFiles(slice_bytes)
        for path in self.files:
            name = str(path.relative_to(self.root))
            kind = _kind(path)
            if storable(name) != name:
                yield {"kind": "reject", "path": storable(name), "reject": "the file name is not UTF-8"}
            elif kind == "texts":
                yield from small.add(name, path.stat().st_size)
            else:
                yield from small.end()
                yield from _LISTERS[kind](path, name, text_column, slice_bytes)
        yield from small.end()


def open_corpus(source: str) -> TextCorpus:
    """`source`: a folder, searched at any depth, or one file: text (a document each), `.jsonl`, also `.gz` and `.zst`,
    `.parquet`, `.arrow` (what `datasets.save_to_disk` makes); or `hub:NAME` or `hub:NAME:CONFIG`, the train split of a data
    set of the Hugging Face hub. In a folder, files without a suffix are text when they begin like it. Raises
    FileNotFoundError or ValueError when there is nothing to read.
    """
    if source.startswith(HUB):
        files = _hub_files(source)
        return TextCorpus(root=Path(os.path.commonpath([file.parent for file in files])), files=tuple(files))
    path = Path(source).resolve()
    if path.is_file():
        return TextCorpus(root=path.parent, files=(path,))
    if not path.is_dir():
        raise FileNotFoundError(f"{source} does not exist; give a text file, a folder of them or {HUB}NAME")
    found = (parent / name for parent, names in walk(path) for name in names)
    files = sorted(p for p in found if p.is_file() and _is_read(p, path))
    if not files:
        raise ValueError(
            f"{source} holds no text; files that end in {', '.join(_SUFFIXES)} are read, and text without a suffix"
        )
    return TextCorpus(root=path, files=tuple(files))


def read_texts(source: str) -> Iterator[TextDocument | Reject]:
    """All of a corpus in order, documents whole, for a story that keeps it in memory. Raises what `open_corpus` does."""
    corpus = open_corpus(source)
    reader = TextReader(root=str(corpus.root), max_words=sys.maxsize)
    return (read.found for piece in corpus.slices() for read in reader.read(piece))


class _SmallFiles:
    """Gathers text files until they fill a slice."""

    def __init__(self, slice_bytes: int) -> None:
        self.slice_bytes = slice_bytes
        self.paths: list[str] = []
        self.size = 0

    def add(self, name: str, size: int) -> Iterator[Slice]:
        if self.size + size > self.slice_bytes:
            yield from self.end()
        self.paths.append(name)
        self.size += size

    def end(self) -> Iterator[Slice]:
        if self.paths:
            yield {"kind": "texts", "paths": self.paths}
        self.paths, self.size = [], 0


def _skipped(file: Any, line: bytes) -> int:
    """Bytes of the rest of a line that is too long, which is read over."""
    skipped = 0
    while len(line) >= 2**20 and not line.endswith(b"\n") and (line := file.readline(2**20)):
        skipped += len(line)
    return skipped


def _is_read(path: Path, root: Path) -> bool:
    """Whether a file of the folder `root` is part of the corpus."""
    if path.name.endswith(_SUFFIXES):
        return _is_listed(path)
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)  # .git is full of small texts
    return not hidden and _BARE.fullmatch(path.name) is not None and _begins_as_text(path)


def _begins_as_text(path: Path) -> bool:
    """UTF-8 without NUL bytes, as far as the head tells; the reader rejects what is broken behind it."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end within a character
    except (UnicodeDecodeError, PermissionError):
        return False
    return bool(head) and b"\0" not in head


def _is_listed(path: Path) -> bool:
    """Whether a file of a saved data set belongs to it; `datasets` leaves files of its cache beside them."""
    state = path.parent / "state.json"
    if path.suffix != ".arrow" or not state.is_file():
        return True
    listed = json.loads(state.read_text(encoding="utf-8")).get("_data_files")
    return listed is None or path.name in {
        entry["filename"] for entry in listed
    }  # else it is the state of something else


def _hub_files(source: str) -> list[Path]:
    """Downloads what is not in the cache of `datasets` yet."""
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("datasets is not installed; run `pip install speechquilt[corpora]`") from error
    data = datasets.load_dataset(name, config or None, split="train")
    return [Path(entry["filename"]) for entry in data.cache_files]


def _kind(path: Path) -> str:
    if path.name.endswith(_LINES):
        return "lines"
    if path.name.endswith(_PACKED_LINES):
        return "packed lines"
    return path.suffix[1:] if path.suffix in (".parquet", ".arrow") else "texts"


def _list_lines(path: Path, name: str, text_column: str, slice_bytes: int) -> Iterator[Slice]:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        start = 0
        while start < size:
            stop = _line_end(file, min(start + slice_bytes, size))
            yield {"kind": "lines", "path": name, "start": start, "stop": stop}
            start = stop


def _line_end(file: BinaryIO, place: int) -> int:
    """The end of the line that holds the byte before `place`."""
    file.seek(place - 1)
    while (piece := file.readline(2**20)) and not piece.endswith(b"\n"):
        pass
    return file.tell()


def _list_packed_lines(path: Path, name: str, text_column: str, slice_bytes: int) -> Iterator[Slice]:
    yield {"kind": "packed lines", "path": name}


def _list_parquet(path: Path, name: str, text_column: str, slice_bytes: int) -> Iterator[Slice]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        _raise_if_of_the_machine(error)
        yield {"kind": "reject", "path": name, "reject": "damaged file"}
        return
    _check_column(path, file.schema_arrow, text_column)
    first = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == text_column)
        rows = max(1, group.num_rows // max(1, -(-size // slice_bytes)))
        for start in range(first, first + group.num_rows, rows):
            stop = min(start + rows, first + group.num_rows)
            yield {
                "kind": "parquet",
                "path": name,
                "group": number,
                "group_start": first,
                "start": start,
                "stop": stop,
            }
        first += group.num_rows


def _list_arrow(path: Path, name: str, text_column: str, slice_bytes: int) -> Iterator[Slice]:
    """Runs through the file without reading it: what is not touched of a mapped file stays on the disk."""
    start = first = size = 0
    try:
        with pa.memory_map(str(path)) as file:
            stream = pa.ipc.open_stream(file)
            _check_column(path, stream.schema, text_column)
            for batch in stream:
                size += batch.column(text_column).nbytes
                first += len(batch)
                if size >= slice_bytes:
                    yield {"kind": "arrow", "path": name, "start": start, "stop": first}
                    start, size = first, 0
    except (pa.ArrowException, OSError) as error:
        _raise_if_of_the_machine(error)
        yield {"kind": "reject", "path": name, "reject": "damaged file"}
    if first > start:
        yield {"kind": "arrow", "path": name, "start": start, "stop": first}


_LISTERS = {
    "lines": _list_lines,
    "packed lines": _list_packed_lines,
    "parquet": _list_parquet,
    "arrow": _list_arrow,
}


def _check_column(path: Path, schema: pa.Schema, text_column: str) -> None:
    if text_column not in schema.names:
        raise ValueError(
            f"{path} has no column {text_column!r}, only {', '.join(schema.names)}; name the one with the text by --text-column"
        )


def _unpacked(packed: BinaryIO, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=packed)
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), "zstd"))


def _raise_if_of_the_machine(error: Exception) -> None:
    """A missing file or a disk that fails is no fault of the data: run again, do not count it as a broken document."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _damaged(id: str) -> Reject:
    return _reject(id, "damaged file")


_REMEDIES = {
    "not UTF-8": "save it as UTF-8",
    "NUL characters in the text": "UTF-16 without its mark? save it as UTF-8",
    "not JSON": 'each line is a JSON object, {"text": "..."}',
    "line too long": f"a line may have {LONGEST_LINE >> 20} MiB; put fewer texts into one",
    "empty text": "leave it out",
    "the text is not a string": "a string is expected there",
    "damaged file": "what stands before is used; get the file again",
    "the file name is not UTF-8": "give it a name in UTF-8 (convmv does so)",
}


def _reject(id: str, reason: str) -> Reject:
    return Reject(id=id, reason=reason, detail=f"{id}: {_REMEDIES.get(reason, 'name the column with the text')}")


def _document(place: str, id: Any, text: Any) -> TextDocument | Reject:
    """`id`: the document's own name; when it has none (None or "") it is named by its `place`."""
    id = place if id in (None, "") else str(id)
    if text is None:
        return _reject(storable(id), "empty text")
    if not isinstance(text, str):
        return _reject(storable(id), "the text is not a string")
    if not text.strip():
        return _reject(storable(id), "empty text")
    if storable(text) != text or storable(id) != id:
        return _reject(storable(id), "not UTF-8")
    return TextDocument(id=id, text=text)
