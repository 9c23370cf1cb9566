"""Read what a user has: a folder of audio with transcripts, and plain text in folders, JSONL or Parquet.

Place in the pipeline: layer 2, the very first step on one's own data; the embedded default uses `micro_world` instead.
Trap: a broken item never stops a run. It is yielded as a `Reject` with its reason, and the caller counts it.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt import audio
from speechquilt.types import AlignedWord, Utterance

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus"}
TEXT_SUFFIXES = {".txt", ".md", ".rst"}


@dataclass(frozen=True, kw_only=True)
class Reject:
    """An item that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class TextDocument:
    """One plain-text document."""

    id: str
    text: str


def read_utterances(folder: Path, *, need_text: bool = True) -> Iterator[Utterance | Reject]:
    """Audio with transcripts, in name order.

    Two layouts: `metadata.jsonl` or `metadata.csv` with `file_name` and `text` (the `audiofolder` layout of Hugging Face
    datasets; JSONL rows may hold `words`: [[word, start_s, end_s], ...]), or every `x.wav` beside an `x.txt`.
    Raises FileNotFoundError when the folder is missing and ValueError when it holds no audio at all.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give a folder of audio files with transcripts")
    rows = list(metadata_rows(folder))
    if not rows:
        raise ValueError(
            f"{folder} holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))}) and no metadata.jsonl or metadata.csv"
        )
    for row in rows:
        yield read_row(folder, row, need_text)


def read_texts(path: Path) -> Iterator[TextDocument | Reject]:
    """Plain text: a folder of .txt/.md/.rst files, a .jsonl with `text` (and `id`), a .parquet with a `text` column."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES | {".jsonl", ".parquet"})
        if not files:
            raise ValueError(f"{path} holds no text; .txt, .md, .rst, .jsonl and .parquet files are read")
        for file in files:
            yield from _read_text_file(file, str(file.relative_to(path)))
    elif path.is_file():
        yield from _read_text_file(path, path.name)
    else:
        raise FileNotFoundError(f"{path} does not exist; give a text file or a folder of them")


def metadata_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What a folder says of each recording before any is decoded: `file_name`, `text`, and whatever else its table has."""
    if (folder / "metadata.jsonl").is_file():
        with (folder / "metadata.jsonl").open(encoding="utf-8") as file:  # str.splitlines would cut inside texts
            yield from (json.loads(line) for line in file if line.strip())
    elif (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)
    else:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES):
            transcript = path.with_suffix(".txt")
            text = transcript.read_text(encoding="utf-8", errors="replace").strip() if transcript.is_file() else None
            yield {"file_name": str(path.relative_to(folder)), "text": text}


def read_row(folder: Path, row: dict[str, Any], need_text: bool) -> Utterance | Reject:
    """Decode one row of `metadata_rows`."""
    name = row.get("file_name") or ""
    text = (row.get("text") or row.get("transcription") or "").strip()
    if not name:
        return Reject(id="?", reason=f"metadata row without file_name: {row}")
    if need_text and not text:
        return Reject(id=name, reason="no transcript: a .txt beside the audio, or `text` in the metadata, is needed")
    try:
        waveform = audio.check(audio.load(folder / name))
    except (ValueError, OSError) as error:
        return Reject(id=name, reason=str(error))
    words = tuple(AlignedWord(text=w, start_s=a, end_s=b) for w, a, b in row.get("words") or ())
    return Utterance(id=name, text=text, audio=waveform, alignment=words)


def _read_text_file(file: Path, name: str) -> Iterator[TextDocument | Reject]:
    if file.suffix == ".jsonl":
        for i, line in enumerate(file.read_text(errors="replace").splitlines()):
            try:
                row = json.loads(line)
                yield _text_document(str(row.get("id", f"{name}:{i}")), row["text"])
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                yield Reject(id=f"{name}:{i}", reason=f"not a JSON object with `text`: {error!r}")
    elif file.suffix == ".parquet":
        import pyarrow.parquet as parquet  # only Parquet corpora pay for it

        for i, text in enumerate(parquet.read_table(file, columns=["text"])["text"].to_pylist()):
            yield _text_document(f"{name}:{i}", text)
    else:
        yield _text_document(name, file.read_text(errors="replace"))


def _text_document(id: str, text: Any) -> TextDocument | Reject:
    if not isinstance(text, str) or not text.strip():
        return Reject(id=id, reason="empty text")
    return TextDocument(id=id, text=text)
