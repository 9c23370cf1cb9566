"""A folder of speech as utterances in memory, decoded one after the other.

Trap: a broken item never stops a run. It is yielded as a `Reject` with its reason, and the caller counts it.
"""

from collections.abc import Iterator
from pathlib import Path

from speechquilt.data.sources.audio_files import read_whole
from speechquilt.data.sources.faults import BrokenAudio, BrokenText
from speechquilt.data.sources.speech_rows import check_length, detail_of, list_audio, root_of, sound_of, text_of
from speechquilt.data.sources.word_times import words_of
from speechquilt.types import Reject, Row, Utterance


def read_utterances(folder: Path, *, need_text: bool = True) -> Iterator[Utterance | Reject]:
    """Audio with transcripts: what `speech_rows.list_audio` finds in a folder or a table; without a table in the order
    of the names.

    Raises FileNotFoundError when the folder is missing and ValueError when it holds no audio at all, or a table that
    cannot be read.
    """
    for row in folder_rows(folder):
        yield read_row(root_of(folder), row, need_text)


def folder_rows(folder: Path) -> list[Row]:
    """What a folder says of each recording before any is decoded."""
    rows = list(list_audio(folder))
    if not any("where" in row for row in rows):
        rows.sort(key=lambda row: Path(row.get("path") or row["id"]))
    return rows


def read_row(folder: Path, row: Row, need_text: bool) -> Utterance | Reject:
    """Decode one row of `folder_rows`."""
    if "reject" in row:
        return Reject(id=row["id"], reason=row["reject"], detail=row["detail"])
    try:
        text = _text(folder, row, need_text)
        waveform = read_whole(sound_of(folder, row))
        check_length(row, waveform.duration_s)
        words = words_of(row, text, waveform.duration_s)
        if text and not waveform.samples_S.any():
            raise silence()
    except BrokenAudio as error:
        return Reject(id=row["id"], reason=error.reason, detail=detail_of(row, error))
    return Utterance(id=row["id"], text=text, audio=waveform, alignment=words)


def silence() -> BrokenAudio:
    """What is said about a recording of zeros that has a text."""
    return BrokenAudio("silence with a transcript", "all samples are zero; record it again, or leave it out")


def _text(folder: Path, row: Row, need_text: bool) -> str:
    try:
        text = text_of(folder, row)
    except BrokenText:
        if need_text:
            raise
        return ""
    if need_text and not text:
        raise BrokenText("no transcript", "a .txt beside the audio, or `text` in its table, is needed")
    return text
