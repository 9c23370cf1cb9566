"""Tables as people have them: CSV, TSV and their dialects, JSON, JSON lines and Parquet, packed or not, in the encoding
they came in.

Trap: a table that is misread looks like a good one with fewer rows. What cannot be told for sure (a quote that swallows
lines, a header without a column of paths) is an error that names the line; what concerns one row is a fault of that
row.
"""

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

# Everything libsndfile knows by its content, but no headerless format.
AUDIO_SUFFIXES = frozenset((
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".nist",
    ".sph", ".voc", ".avr", ".svx", ".htk", ".paf",
))  # fmt: skip
PATH_COLUMNS = (
    "path", "file_name", "audio_file", "audio_filepath", "audio_path", "filename", "wav_filename", "file", "wav", "audio",
)  # fmt: skip
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
PACKED = (".gz", ".zst")
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
DELIMITERS = ",;|\t"
QUOTED = ",;"  # in tables cut at these, a quote at the start of a field holds the field together; elsewhere it is a character
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row: what it holds, or why it holds nothing. `where`: its place, for people."""

    where: str
    values: dict[str, Any]
    fault: str = ""
    detail: str = ""


def table_suffix(path: Path) -> str:
    """The format of a table by its name, packing aside: ".csv" of "x.csv.gz"; "" when it is none."""
    name = path.with_suffix("") if path.suffix in PACKED else path
    suffix = name.suffix.lower()
    return suffix if suffix in SUFFIXES and not (suffix == ".parquet" and path.suffix in PACKED) else ""


def read_table(path: Path) -> Iterator[TableRow]:
    """The rows of a table of any format but Parquet, in order. Raises ValueError when the table as a whole cannot be
    read.
    """
    suffix = table_suffix(path)
    if suffix == ".json":
        return _json_rows(path)
    if suffix == ".jsonl":
        return _jsonl_rows(path)
    return _delimited_rows(path, "\t" if suffix == ".tsv" else "")


def first_object(path: Path) -> dict[str, Any]:
    """What a table begins with, for a look at what it is: the first object of JSON, the columns of a header as keys; {}
    when that cannot be told from its first megabyte.
    """
    with unpacked(path) as file:
        head = file.read(1 << 20)
    try:
        text = decoded(head[: head.rfind(b"\n") + 1] or head)
        if table_suffix(path) in (".csv", ".tsv"):
            _, columns, has_header = _dialect(path, text.lstrip().split("\n")[0].rstrip("\r"), "")
            return dict.fromkeys(columns, "?") if has_header else {}
        found, _ = json.JSONDecoder().raw_decode(text, text.find("{"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def path_of(values: dict[str, Any]) -> Any:
    """What a row says under the first of `PATH_COLUMNS` that it fills; None when it fills none."""
    return next((values[name] for name in PATH_COLUMNS if values.get(name)), None)


def text_column_of(values: dict[str, Any]) -> Any:
    """What a row says under the first of `TEXT_COLUMNS` that it fills; None when it fills none."""
    return next((values[name] for name in TEXT_COLUMNS if values.get(name) not in (None, "")), None)


def decoded(data: bytes) -> str:
    """Bytes of a text file as text, without its byte-order mark: UTF-8, or UTF-16 and UTF-32 with their marks.

    Raises UnicodeDecodeError.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode() if encoding == "utf-8" else data.decode(encoding)
    return data.decode()


def unpacked(path: Path) -> BinaryIO:
    """A file's content, unpacked when its name ends in .gz or .zst."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def lines(path: Path) -> Iterator[tuple[str, bool]]:
    """The lines of a text file, unpacked and decoded, and whether each could be decoded; a bad one has U+FFFD in it.

    Raises ValueError when a packed file is damaged.
    """
    try:
        with unpacked(path) as file:
            head = file.read(4)
            encoding = next((e for mark, e in _MARKS if head.startswith(mark)), "utf-8")
            if encoding != "utf-8":
                text = (head + file.read()).decode(encoding).removeprefix("\ufeff")
                yield from ((line, True) for line in io.StringIO(text, newline="\n"))
                return
            first = io.BytesIO((head + file.readline()).removeprefix(codecs.BOM_UTF8))
            for part in (first, file):
                yield from map(_decoded_line, part)
    except (EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the machine, not of the data
        raise ValueError(f"{path} is damaged ({error}); pack it again") from error


def _decoded_line(line: bytes) -> tuple[str, bool]:
    try:
        return line.decode(), True
    except UnicodeDecodeError:
        return line.decode("utf-8", "replace"), False


def _row(path: Path, number: int, values: Any, fault: str = "", detail: str = "") -> TableRow:
    where = f"{path.name} line {number}"
    if not fault and not isinstance(values, dict):
        fault, detail = "not a row of a table", 'a JSON object is expected, {"file_name": "x.wav", "text": "..."}'
    return TableRow(where=where, values=values if isinstance(values, dict) else {}, fault=fault, detail=detail)


_NOT_UTF8 = ("not UTF-8", "save the table as UTF-8")


def _jsonl_rows(path: Path) -> Iterator[TableRow]:
    for number, (line, good) in enumerate(lines(path), 1):
        if not line.strip():
            continue
        if not good:
            yield _row(path, number, {}, *_NOT_UTF8)
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield _row(path, number, {}, "not JSON", f"{error}; each line is a JSON object")
        else:
            yield _row(path, number, values)


def _json_rows(path: Path) -> Iterator[TableRow]:
    """A list of objects, whole in memory; or, as some tools name them, JSON lines."""
    start = next((line.lstrip()[:1] for line, _ in lines(path) if line.strip()), "")
    if start != "[":
        yield from _jsonl_rows(path)
        return
    try:
        with unpacked(path) as file:
            values = json.loads(decoded(file.read()))
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not JSON ({error}); a list of objects is expected, or one object a line"
        ) from error
    for number, row in enumerate(values, 1):
        yield _row(path, number, row)


# --- CSV and its dialects


def _delimited_rows(path: Path, delimiter: str) -> Iterator[TableRow]:
    first = next((line for line, _ in lines(path) if line.strip()), "").rstrip("\r\n")
    if "\0" in first:
        raise ValueError(f"{path} holds NUL characters: UTF-16 without its mark? save it as UTF-8")
    delimiter, columns, has_header = _dialect(path, first, delimiter)
    records = _quoted(path, delimiter, columns) if delimiter in QUOTED else _plain(path, delimiter)
    for number, fields, good in records:
        if has_header:
            has_header = False
        elif not good:
            yield _row(path, number, {}, *_NOT_UTF8)
        elif len(fields) > len(columns):
            extra = f"{len(fields)} fields under {len(columns)} columns; put a text that holds {delimiter!r} in quotes"
            yield _row(path, number, dict(zip(columns, fields)), "more fields than columns", extra)
        else:
            yield _row(path, number, dict(zip(columns, fields)))


def _dialect(path: Path, first: str, delimiter: str) -> tuple[str, list[str], bool]:
    """Delimiter, names of the columns, and whether the first line is a header. Without one (LJSpeech) the first field
    is a name of audio and the last one the text.
    """
    choices = delimiter or DELIMITERS
    for choice in choices:
        names = [name.strip() for name in _header(first, choice)]
        names = [name.lower() if name.lower() in (*PATH_COLUMNS, *TEXT_COLUMNS) else name for name in names]
        if set(names) & set(PATH_COLUMNS):
            return choice, names, True
    for choice in sorted(choices, key=lambda choice: choice != "|"):
        fields = first.split(choice)
        if len(fields) > 1 and _names_audio(path.parent, fields[0]):
            return choice, ["path", *(f"column{i}" for i in range(2, len(fields))), "text"], False
    raise ValueError(
        f"{path}: its first line {first[:80]!r} names no column of paths ({', '.join(PATH_COLUMNS)}), and its first field is no "
        "audio file either; add a header, for example file_name,text"
    )


def _header(first: str, delimiter: str) -> list[str]:
    """Its fields; none where it cannot be a header, as with a carriage return in its middle."""
    try:
        return next(csv.reader([first], delimiter=delimiter), [])
    except csv.Error:
        return []


def _names_audio(folder: Path, name: str) -> bool:
    if Path(name).suffix.lower() in AUDIO_SUFFIXES:
        return True
    return located(folder, name) is not None


def located(folder: Path, name: str) -> tuple[str, str] | None:
    """(folder in front, suffix behind) with which a name leads to a file: Common Voice's lie in clips/, LJSpeech's in
    wavs/ and are named without a suffix. None when nothing does.
    """
    known = Path(name).suffix.lower() in AUDIO_SUFFIXES
    for before in ("", "clips/", "wavs/", "wav/", "audio/"):
        for behind in ("",) if known else ("", ".wav", ".flac", ".mp3", ".ogg", ".opus"):
            if os.path.isfile(folder / f"{before}{name}{behind}"):
                return before, behind
    return None


def _plain(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], bool]]:
    for number, (line, good) in enumerate(lines(path), 1):
        if line.strip():
            yield number, line.rstrip("\r\n").split(delimiter), good


def _quoted(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str], bool]]:
    """Records, which may run over several lines inside quotes. Raises ValueError where a quote swallows other rows."""
    taken: list[tuple[str, bool]] = []  # the lines of this record

    def feed() -> Iterator[str]:
        for entry in lines(path):
            taken.append(entry)
            yield entry[0]

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _stray_quote(path, number, str(error)) from error
        if fields is None:
            return
        if any(_looks_like_a_row(line, delimiter, columns) for line, _ in taken[1:]):
            raise _stray_quote(path, number, f"it runs over {len(taken)} lines that look like rows")
        if fields:
            yield number, fields, all(good for _, good in taken)
        number += len(taken)
        taken.clear()


def _looks_like_a_row(line: str, delimiter: str, columns: Sequence[str]) -> bool:
    fields = line.rstrip("\r\n").split(delimiter)
    named = next(i for i, name in enumerate(columns) if name in PATH_COLUMNS)
    return len(fields) == len(columns) and Path(fields[named].strip('"')).suffix.lower() in AUDIO_SUFFIXES


def _stray_quote(path: Path, number: int, why: str) -> ValueError:
    return ValueError(
        f"{path} line {number}: a quote that opens there is not closed ({why}), so other rows would be lost; write a quote inside "
        'a quoted field twice (""), or take the stray one out'
    )
