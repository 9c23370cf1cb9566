"""Audio files of any length and rate as a stream of pieces at the tokenizer's rate, read ahead of who needs them.

For training sets that fit in memory, `speech_folder.read_utterances` reads the same folders whole.
Trap: nothing in a header can be believed. Files are read block by block and checked as they come, so a file may turn
out to be broken after some of its pieces were given out; its `End` says so, and its pieces are then to be forgotten.
"""

import csv
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from speechquilt import audio
from speechquilt.types import AlignedWord, Row

# Everything libsndfile knows by its content, but no headerless format.
AUDIO_SUFFIXES = frozenset((
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".nist",
    ".sph", ".voc", ".avr", ".svx", ".htk", ".paf",
))  # fmt: skip
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz; outside lies no recording of speech but a broken header
LOUDEST = 64.0  # times full scale; beyond lies no sound but numbers of another meaning
BLOCK_SAMPLES = 1 << 17  # decoded at once, over all channels
AHEAD = 4  # pieces of one file that wait in memory

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive samples of file number `file` at the tokenizer's rate; all but a file's last have the full length. The first
    `num_repeated` are the last of the piece before."""

    file: int
    samples_S: np.ndarray
    num_repeated: int = 0


@dataclass(frozen=True, kw_only=True)
class End:
    """No more pieces of this file. `reject`: why it cannot be used, "" when it can; `duration_s`: of what was heard."""

    file: int
    reject: str = ""
    duration_s: float = 0.0


class BrokenAudio(ValueError):
    """A file that cannot be used; the message is a short class of fault, without names, so that rejects can be counted."""


def list_audio(path: Path) -> Iterator[Row]:
    """The files of a corpus in a fixed order: {"id", "path", "text", "words"}, or {"id", "reject"} for a broken row.

    A folder with `metadata.jsonl` or `metadata.csv` (`file_name`, `text`, `words`: [[word, start_s, end_s], ...]); any other
    folder, searched for audio (transcripts beside it are looked for by `transcript_of`); or a .jsonl or .parquet table with
    a column `path` and, when they are known, `id`, `text`, `words`. Paths are relative to the folder, or to the table's.
    Raises FileNotFoundError when there is no such folder or table, ValueError when it has no audio.
    """
    path = Path(path)
    if path.is_dir():
        table = next((path / n for n in ("metadata.jsonl", "metadata.csv") if (path / n).is_file()), None)
        return _not_empty(_walk(path) if table is None else _table(table), path)
    if path.is_file() and path.suffix in (".jsonl", ".parquet"):
        return _not_empty(_table(path), path)
    raise FileNotFoundError(f"{path} is not a folder of audio and not a .jsonl or .parquet table with a column `path`")


def transcript_of(path: Path) -> str:
    """The text in `x.txt` beside `x.wav`, "" without one."""
    transcript = path.with_suffix(".txt")
    return transcript.read_text(encoding="utf-8", errors="replace").strip() if transcript.is_file() else ""


def words_of(item: Row) -> tuple[AlignedWord, ...]:
    """The word times of a row: [word, start_s, end_s] or, as in Parquet, {text, start_s, end_s} each. Raises BrokenAudio."""
    try:
        rows = [
            (w["text"], w["start_s"], w["end_s"]) if isinstance(w, dict) else tuple(w) for w in item.get("words") or ()
        ]
        return tuple(AlignedWord(text=str(w), start_s=float(a), end_s=float(b)) for w, a, b in rows)
    except (TypeError, ValueError, KeyError) as error:
        raise BrokenAudio("words are not [[word, start_s, end_s], ...]") from error


def read_pieces(
    path: Path, file: int, *, rate: int, piece_samples: int, max_seconds: float, repeated_samples: int = 0
) -> Iterator[Piece | End]:
    """First channel of a file, resampled to `rate` as a stream, in pieces of `piece_samples`; the last item is an `End`.

    The samples are those of `audio.resample(audio.load(path))`; a piece begins with the last `repeated_samples` of the one
    before. Memory is bounded by a block and a piece.
    """
    heard = 0
    try:
        for piece in cut(_resampled(path, rate), file, piece_samples, repeated_samples):
            heard += len(piece.samples_S) - piece.num_repeated
            if heard > max_seconds * rate:
                raise BrokenAudio(f"longer than {max_seconds:g} s")
            yield piece
        if not heard:
            raise BrokenAudio("empty audio")
    except BrokenAudio as error:
        yield End(file=file, reject=str(error), duration_s=heard / rate)
    else:
        yield End(file=file, duration_s=heard / rate)


def cut(blocks: Iterable[np.ndarray], file: int, piece_samples: int, repeated_samples: int = 0) -> Iterator[Piece]:
    """The same samples in pieces of one length; the last may be shorter, none is empty or only repeats."""
    if not 0 <= repeated_samples < piece_samples:
        raise ValueError(f"repeated_samples={repeated_samples} must be less than piece_samples={piece_samples}")
    waiting: list[np.ndarray] = []
    num_repeated = 0
    for block_S in blocks:
        waiting.append(block_S)
        if sum(len(x) for x in waiting) < piece_samples:
            continue
        together_S = np.concatenate(waiting)
        while len(together_S) >= piece_samples:
            yield Piece(file=file, samples_S=together_S[:piece_samples], num_repeated=num_repeated)
            together_S, num_repeated = together_S[piece_samples - repeated_samples :], repeated_samples
        waiting = [together_S]
    if sum(len(x) for x in waiting) > num_repeated:
        yield Piece(file=file, samples_S=np.concatenate(waiting), num_repeated=num_repeated)


def read_ahead(
    sources: Sequence[T], read: Callable[[T], Iterable[Piece | End]], *, threads: int
) -> Iterator[Piece | End]:
    """`read(source)` of all sources, chained in order, while `threads` of them are read in the background.

    Each waits after `AHEAD` items until it is its turn, so memory is bounded by the number of threads.
    """
    waiting: list[_Channel[Piece | End]] = []
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            for source in sources:
                waiting.append(_Channel(stop, AHEAD))
                pool.submit(waiting[-1].fill, read, source)
                if len(waiting) > 2 * threads:
                    yield from waiting.pop(0)
            for channel in waiting:
                yield from channel
        finally:
            stop.set()


def prefetch(items: Iterable[T], *, ahead: int) -> Iterator[T]:
    """The same items, made in a thread while `ahead` of them wait."""
    stop = threading.Event()
    channel: _Channel[T] = _Channel(stop, ahead)
    thread = threading.Thread(target=channel.fill, args=(lambda source: source, items), daemon=True)
    thread.start()
    try:
        yield from channel
    finally:
        stop.set()
        thread.join()


class _Channel(Generic[T]):
    """A bounded queue from one thread to another; what the writer raises, the reader raises."""

    def __init__(self, stop: threading.Event, ahead: int) -> None:
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(ahead)
        self._stop = stop

    def fill(self, read: Callable[[Any], Iterable[T]], source: Any) -> None:
        try:
            for item in read(source):
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def __iter__(self) -> Iterator[T]:
        while True:
            kind, value = self._queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def _put(self, kind: str, value: Any) -> bool:
        """False when the reader has gone."""
        while not self._stop.is_set():
            try:
                self._queue.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _not_empty(items: Iterator[Row], path: Path) -> Iterator[Row]:
    first = next(items, None)
    if first is None:
        raise ValueError(f"{path} holds no audio ({', '.join(sorted(AUDIO_SUFFIXES))}) and no rows of metadata")
    yield first
    yield from items


def _walk(folder: Path) -> Iterator[Row]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if Path(name).suffix.lower() in AUDIO_SUFFIXES:
                path = os.path.relpath(os.path.join(parent, name), folder)
                yield {"id": path, "path": path, "text": None, "words": None}


def _table(path: Path) -> Iterator[Row]:
    rows = {".jsonl": jsonl_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    for number, row in enumerate(rows(path)):
        name = row.get("path") or row.get("file_name") if isinstance(row, dict) else None
        if not (isinstance(name, str) and name):
            yield {"id": f"{path.name}:{number}", "reject": "row without a path"}
            continue
        text = row.get("text") or row.get("transcription") or ""
        yield {"id": str(row.get("id") or name), "path": name, "text": str(text).strip(), "words": row.get("words")}


def jsonl_rows(path: Path) -> Iterator[Any]:
    """What each line holds, None where that is no JSON; empty lines aside. (`str.splitlines` would cut inside texts.)"""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    yield None


def _csv_rows(path: Path) -> Iterator[Any]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        yield from csv.DictReader(file)


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet  # only Parquet tables pay for it

    known = {"path", "file_name", "id", "text", "transcription", "words"}
    file = parquet.ParquetFile(path)
    for batch in file.iter_batches(columns=[n for n in file.schema_arrow.names if n in known]):
        yield from batch.to_pylist()


def _resampled(path: Path, rate: int) -> Iterator[np.ndarray]:
    """First channel at `rate`, block by block."""
    soundfile = audio.package("soundfile")
    try:
        with soundfile.SoundFile(str(path)) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise BrokenAudio(f"its sample rate is outside {LOWEST_RATE}..{HIGHEST_RATE} Hz")
            blocks = _blocks(file)
            yield from blocks if file.samplerate == rate else _resample(blocks, file.samplerate, rate)
    except soundfile.LibsndfileError as error:
        raise BrokenAudio(f"cannot be read as audio: {error.error_string}") from error
    except OSError as error:
        raise BrokenAudio(f"cannot be read: {error.strerror}") from error


def _blocks(file: Any) -> Iterator[np.ndarray]:
    num_frames = max(1, BLOCK_SAMPLES // file.channels)
    while len(block_SC := file.read(num_frames, dtype="float32", always_2d=True)):
        samples_S = np.ascontiguousarray(block_SC[:, 0])
        if not np.isfinite(samples_S).all():
            raise BrokenAudio("audio holds samples that are NaN or infinite")
        if np.abs(samples_S).max() > LOUDEST:
            raise BrokenAudio(f"audio holds samples beyond {LOUDEST:g} times full scale")
        yield samples_S


def _resample(blocks: Iterable[np.ndarray], rate_in: int, rate: int) -> Iterator[np.ndarray]:
    stream = audio.package("soxr").ResampleStream(rate_in, rate, 1, dtype="float32")
    for samples_S in blocks:
        yield stream.resample_chunk(samples_S)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
