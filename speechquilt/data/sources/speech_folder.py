"""Read what a user has: a folder of audio with transcripts. Texts: `text_files`.

Trap: a broken item never stops a run. It is yielded as a `Reject` with its reason, and the caller counts it.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechquilt import audio
from speechquilt.data.sources.audio_files import AUDIO_SUFFIXES, jsonl_rows, words_of
from speechquilt.types import Reject, Utterance


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


def metadata_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """What a folder says of each recording before any is decoded: `file_name`, `text`, and whatever else its table has."""
    if (folder / "metadata.jsonl").is_file():
        yield from (row if isinstance(row, dict) else {} for row in jsonl_rows(folder / "metadata.jsonl"))
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
    text = str(row.get("text") or row.get("transcription") or "").strip()
    if not name:
        return Reject(id="?", reason=f"metadata row without file_name: {row}")
    if need_text and not text:
        return Reject(id=name, reason="no transcript: a .txt beside the audio, or `text` in the metadata, is needed")
    try:
        waveform = audio.check(audio.load(folder / name))
        words = words_of(row)
    except (ValueError, OSError) as error:
        return Reject(id=name, reason=str(error))
    return Utterance(id=name, text=text, audio=waveform, alignment=words)
