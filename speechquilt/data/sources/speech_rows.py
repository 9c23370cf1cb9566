"""Whatever a user has of speech as one list of recordings: folders, tables, Parquet, tars, lhotse cuts, LibriSpeech.

A row is plain JSON data: `id`, `path` (relative to the corpus; it may lead through a file that holds the audio), `text`
(None: look beside the audio), `words`; and where they are known `start`, `end` (a part of the file, in seconds),
`duration`, `where` (the place in its table, for people), `at` (place in a tar), `cut` (of lhotse's), `text_fault`. Or
`id`, `reject` and `detail`.

Trap: rows are listed before anything is opened. What they promise (a file, its length, its words) is checked when it is
read.
"""

import io
import math
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.data.sources import cuts, packed_audio
from speechquilt.data.sources.faults import BrokenAudio, BrokenText
from speechquilt.data.sources.folders import find, is_storable, storable, walk
from speechquilt.data.sources.tables import (
    AUDIO_SUFFIXES,
    PATH_COLUMNS,
    TableRow,
    decoded,
    first_object,
    lines,
    located,
    path_of,
    read_table,
    table_suffix,
    text_column_of,
)
from speechquilt.data.sources.word_times import SLACK_S
from speechquilt.text import spoken_form
from speechquilt.types import Row

TRANSCRIPTS = ".trans.txt"  # LibriSpeech: a line for each recording of the folder, its name and its text
MISFIT = 0.05  # share by which a recording may differ from the duration in its table, when that is more than SLACK_S
_NO_TEXT = frozenset(
    ("nan", "NaN", "None", "null", "NULL", "<NA>", "N/A", "n/a", "#N/A")
)  # how tools write that there is none
_NOTE = re.compile(r"\[[^\[\]]*\]|<[^<>]*>|\{[^{}]*\}|\*[^*]*\*|\((?:inaudible|unintelligible|crosstalk|laugh\w*|noise|music|silence|applause|"
                   r"cough\w*|sigh\w*|no speech)\)", re.IGNORECASE)  # fmt: skip


@dataclass(frozen=True)
class Sound:
    """What to decode: a file's name or its content, or samples that are there already; and which part of it."""

    source: Any
    start_s: float = 0.0
    end_s: float | None = None


def list_audio(path: Path) -> Iterator[Row]:
    """The recordings of a corpus in a fixed order, as rows.

    A folder: with a table (`metadata.*`, or one other that names audio), with a table in each of its folders, with
    LibriSpeech's transcripts, or just audio (transcripts beside it are looked for by `text_of`); without any of these,
    its tars and Parquet files. Or one table, tar or manifest of lhotse cuts. Raises FileNotFoundError when there is no
    such thing, ValueError when it holds no audio or a table cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _not_empty(_folder(path), path)
    if path.is_file() and (table_suffix(path) or path.suffix == ".tar"):
        return _not_empty(_listed([path], ""), path)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar.zst")):
        raise ValueError(f"{path} is packed, so no recording can be read from its place; unpack it to a .tar")
    raise FileNotFoundError(
        f"{path} is not a folder of audio, nor a table with a column `path` (.jsonl, .json, .csv, .tsv, also .gz and .zst; .parquet), a .tar "
        "or a manifest of cuts"
    )


def root_of(path: Path) -> Path:
    """What the paths of `list_audio(path)` are relative to."""
    return path if path.is_dir() else path.parent


def sound_of(root: Path, row: Row) -> Sound:
    """What a row's recording is decoded from. Raises BrokenAudio."""
    if "cut" in row:
        try:
            return Sound(cuts.heard(cuts.cut_of(row)))
        except (ValueError, OSError) as error:
            raise BrokenAudio("lhotse cannot read the cut", str(error)) from error
    found: Path | io.BytesIO | None = find(root, row["path"])
    if found is None:
        found = packed_audio.inside(root / row["path"], row)
    if found is None or (isinstance(found, Path) and not found.is_file()):
        raise BrokenAudio(
            "missing file", f"{root / row['path']} is missing, or may not be read; put it there, or take its row out"
        )
    return Sound(str(found) if isinstance(found, Path) else found, row.get("start") or 0.0, row.get("end"))


def text_of(root: Path, row: Row) -> str:
    """The transcript of a row, from its table or from `x.txt` beside `x.wav`; "" without one. Raises BrokenText."""
    if row.get("text_fault"):
        raise BrokenText(*row["text_fault"])
    text, source = row["text"], ""
    if text is None:
        text, source = _beside(root / row["path"])
    if "\0" in text:
        raise BrokenText("NUL characters in the text", f"{source}UTF-16 without its mark? save it as UTF-8")
    if text and is_silent(text):
        raise BrokenText(
            "no words in the transcript", f"{source}{text[:60]!r}; leave it out, the recording is speech all the same"
        )
    return text


def is_silent(text: str) -> bool:
    """Whether a text says nothing: signs alone, notes like [noise], or what tools write for a missing value."""
    return text in _NO_TEXT or not spoken_form(text) or not spoken_form(_NOTE.sub(" ", text))


def check_length(row: Row, duration_s: float) -> None:
    """Raises BrokenAudio when what was heard is not as long as the row says."""
    said = row["end"] - row["start"] if row.get("end") is not None else row.get("duration")
    if said is not None and not same_length(said, duration_s):
        raise BrokenAudio(
            "not as long as its table says",
            f"{duration_s:.2f} s are heard, its table says {said:.2f} s; mend the duration, or the file, which may be cut short",
        )


def same_length(said_s: float, heard_s: float) -> bool:
    """Tables are rounded and codecs pad, but half a second and 5 % are another recording."""
    return abs(heard_s - said_s) <= max(SLACK_S, MISFIT * said_s)


def detail_of(row: Row, error: BrokenAudio) -> str:
    """For a person: the place of the row, and what is wrong there."""
    place = row.get("where") or row.get("path") or row["id"]
    return f"{place}: {error.detail or error.reason}"


# --- what a folder holds


def _not_empty(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))}) and no rows of metadata")
    return chain([first], rows)


def _folder(folder: Path) -> Iterator[Row]:
    table = _metadata(folder, [p.name for p in folder.iterdir()]) or _only_table(folder)
    if table is not None:
        yield from _listed([table], "")
        return
    containers: list[Path] = []
    empty = True
    for parent, names in walk(folder):
        containers += [parent / n for n in names if n.endswith(packed_audio.CONTAINERS)]
        table = _metadata(parent, names) if parent != folder else None
        for row in _listed([table], f"{parent.relative_to(folder)}/") if table else _audio_in(folder, parent, names):
            empty = False
            yield row
    if empty:
        speech = [p for p in containers if p.suffix == ".tar" or packed_audio.is_speech_parquet(p)]
        for path in speech:
            before = path.parent.relative_to(folder).as_posix()
            yield from _listed([path], "" if before == "." else f"{before}/")


def _metadata(folder: Path, names: Iterable[str]) -> Path | None:
    """The table that a folder names as its own; JSON lines before others, as ever."""
    found = [folder / n for n in names if n.startswith("metadata.") and table_suffix(folder / n)]
    order = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
    return min(found, key=lambda path: (order.index(table_suffix(path)), path.name), default=None)


def _only_table(folder: Path) -> Path | None:
    """The one table that lists the folder's recordings under another name. Raises ValueError when several do."""
    tables = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and table_suffix(p))
    found = [path for path in tables if path.suffix != ".parquet" and _lists_audio(path)]
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds several tables: {', '.join(p.name for p in found)}; name the one to use, for example {found[0]}"
        )
    return found[0] if found else None


def _lists_audio(path: Path) -> bool:
    try:
        first = first_object(path)
    except (OSError, EOFError, ValueError):
        return False  # some other kind of file
    return isinstance(path_of(first), str) or cuts.is_cut(first)


def _audio_in(root: Path, parent: Path, names: list[str]) -> Iterator[Row]:
    said = _transcripts(parent, names)
    before = "" if parent == root else f"{parent.relative_to(root)}/"
    found = set()
    for name in names:
        if Path(name).suffix.lower() not in AUDIO_SUFFIXES:
            continue
        path = before + name
        found.add(Path(name).stem)
        if not is_storable(path):
            detail = f"{storable(path)}: give it a name in UTF-8 (convmv does so)"
            yield {"id": storable(path), "reject": "the file name is not UTF-8", "detail": detail}
        else:
            yield {"id": path, "path": path, "text": said.get(Path(name).stem, (None, ""))[0], "words": None}
    for stem, (_, where) in said.items():
        if stem not in found:
            detail = f"{where}: no audio {before}{stem} is there; get it, or take its line out"
            yield {"id": before + stem, "reject": "missing file", "detail": detail}


def _transcripts(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """LibriSpeech's texts of a folder's recordings by their names without suffix, each with its place."""
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        if name.endswith(TRANSCRIPTS):
            for number, (line, _) in enumerate(lines(folder / name), 1):
                stem, _, text = line.strip().partition(" ")
                if stem:
                    found[stem] = (text.strip(), f"{name} line {number}")
    return found


def _beside(path: Path) -> tuple[str, str]:
    """The text in `x.txt` beside `x.wav`, and how to name it; "" without one."""
    transcript = find(path.parent, f"{path.stem}.txt")
    if transcript is None:
        return "", ""
    try:
        return decoded(transcript.read_bytes()).strip(), f"{transcript.name}: "
    except UnicodeDecodeError as error:
        raise BrokenText("not UTF-8", f"{transcript.name}: {error.reason}; save it as UTF-8") from error


# --- rows of tables


def _listed(tables: list[Path], before: str) -> Iterator[Row]:
    """The rows of tables that belong together, `before` set in front of their paths and ids, without what stands there
    twice.
    """
    return _without_repeats(lambda: (row for table in tables for row in _table(table, before)))


def _table(path: Path, before: str) -> Iterator[Row]:
    if path.suffix == ".tar":
        rows = packed_audio.tar_rows(path)
    elif path.suffix == ".parquet":
        rows = packed_audio.parquet_rows(path)
    else:
        rows = read_table(path)
        first = next(rows, None)
        if first is not None and cuts.is_cut(first.values):
            yield from cuts.cut_rows(path)
            return
        rows = _with_layout(path.parent, chain([first] if first else [], rows))
    for number, row in enumerate(rows):
        yield _from_table(row, f"{path.name}:{number}", before)


def _with_layout(folder: Path, rows: Iterable[TableRow]) -> Iterator[TableRow]:
    """The first name that leads to a file says where all of the table's lie, and whether they lack their suffix."""
    layout: tuple[str, str] | None = None
    for row in rows:
        name = path_of(row.values)
        if isinstance(name, str) and not row.fault:
            layout = layout or located(folder, name)
            if layout and layout != ("", ""):
                row.values["path"] = f"{layout[0]}{name}{layout[1]}"
                row.values.setdefault("id", name)
        yield row


def _from_table(row: TableRow, place: str, before: str) -> Row:
    values = row.values
    name = path_of(values)
    if row.fault:
        return {
            "id": before + str(values.get("id") or name or place),
            "reject": row.fault,
            "detail": f"{row.where}: {row.detail}",
        }
    if not isinstance(name, str):
        detail = f"{row.where}: none of {', '.join(PATH_COLUMNS)} is filled; name the audio file"
        return {"id": before + place, "reject": "row without a path", "detail": detail}
    text = text_column_of(values)
    found: Row = {
        "id": "",
        "path": before + name,
        "text": str("" if text is None else text).strip(),
        "words": values.get("words"),
    }
    found["where"] = row.where
    found |= {key: values[key] for key in ("at", "text_fault") if values.get(key) is not None}
    if isinstance(text, dict | list):
        found["text_fault"] = ["the text is not a string", f"it is {str(text)[:60]!r}"]
    try:
        found |= _times(values)
    except ValueError as error:
        return {"id": before + name, "reject": "start, end or duration is no time", "detail": f"{row.where}: {error}"}
    part = f"#{found['start']:g}-{found['end']:g}" if "end" in found else ""
    found["id"] = storable(before + str(values.get("id") or name + part))
    if not is_storable(name):
        return {"id": found["id"], "reject": "the file name is not UTF-8", "detail": f"{row.where}: {storable(name)}"}
    return found


def _times(values: dict[str, Any]) -> Row:
    """`start` and `end` of a part of a file, or NeMo's `offset` and `duration`; and `duration`. Raises ValueError."""
    given = {key: _number(key, values.get(key)) for key in ("start", "end", "offset", "duration")}
    start, end, duration = given["start"], given["end"], given["duration"]
    if given["offset"] is not None and duration is not None and start is None:
        start, end = given["offset"], given["offset"] + duration
    if start and end is None and duration is not None:
        end = start + duration
    if end is not None or start:
        if start is None or end is None or not 0 <= start < end:
            raise ValueError(f"start={start} and end={end} must be seconds of the file, the start before the end")
        return {"start": start, "end": end}
    return {} if not duration else {"duration": duration}


def _number(key: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = float(value)  # a ValueError says what it is
    if math.isnan(number):
        return None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{key}={value} must be a number of seconds")
    return number


# --- what stands in a table twice


def _without_repeats(read: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Rows of one file that have no start and end are refused, all of them, unless they are one row repeated; so is
    whatever has the id of a row before it. The table is read twice, which costs less memory than its names.
    """
    keys = [array("q"), array("q"), array("q")]
    for row in read():
        if "reject" not in row:
            for found, key in zip(keys, _keys(row)):
                found.append(hash(key))
    path_N, row_N, id_N = map(_repeated, keys)
    seen: set[int] = set()
    for row in read():
        if "reject" not in row:
            path, whole, id = map(hash, _keys(row))
            if path in path_N and path_N[path] != row_N.get(whole):
                row = _several_rows(row)
            elif (whole in row_N and whole in seen) or (id in id_N and id in seen):
                row = _repeat(row)
            seen.update(key for key, times in ((whole, row_N), (id, id_N)) if key in times)
        yield row


def _keys(row: Row) -> tuple[Any, Any, Any]:
    """What two rows must not share: the file (or its part), and the id; and all of a row."""
    path = unicodedata.normalize("NFC", row["path"])
    place = (path, row.get("start"), row.get("end"), "file")
    return place, (path, row["id"], row["text"], str(row["words"]), row.get("start"), "row"), (row["id"], "id")


def _repeated(keys: "array[int]") -> dict[int, int]:
    if not keys:
        return {}
    values, counts = np.unique(np.frombuffer(keys, dtype=np.int64), return_counts=True)
    return dict(zip(values[counts > 1].tolist(), counts[counts > 1].tolist()))


def _several_rows(row: Row) -> Row:
    what = f"{row['path']} has several rows of the same part; give each its own `start` and `end` in seconds, or a file of its own"
    return {"id": row["id"], "reject": "several rows for one recording", "detail": f"{row['where']}: {what}"}


def _repeat(row: Row) -> Row:
    what = f"id {row['id']!r} is that of a row before it; give each recording an id of its own"
    return {"id": row["id"], "reject": "duplicate id", "detail": f"{row['where']}: {what}"}
