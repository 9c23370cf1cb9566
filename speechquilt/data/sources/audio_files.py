"""Audio of any length and rate as a stream of pieces at the tokenizer's rate, read ahead of who needs them; or whole.

For training sets that fit in memory, `speech_folder.read_utterances` reads the same folders whole.
Trap: nothing in a header can be believed. Files are read block by block and checked as they come, so a file may turn
out to be broken after some of its pieces were given out; its `End` says so, and its pieces are then to be forgotten.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from speechquilt import audio
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_rows import Sound
from speechquilt.types import Waveform

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000  # Hz; outside lies no recording of speech but a broken header
LOUDEST = 64.0  # times full scale; beyond lies no sound but numbers of another meaning
BLOCK_SAMPLES = 1 << 17  # decoded at once, over all channels
AHEAD = 4  # pieces of one file that wait in memory

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive samples of file number `file` at the tokenizer's rate; all but a file's last have the full length.
    The first `num_repeated` are the last of the piece before.
    """

    file: int
    samples_S: np.ndarray
    num_repeated: int = 0


@dataclass(frozen=True, kw_only=True)
class End:
    """No more pieces of this file. `reject`, `detail`: why it cannot be used, "" when it can; `duration_s`: of what was
    heard, in `channel`; `is_silent`: all of it is zero.
    """

    file: int
    reject: str = ""
    detail: str = ""
    duration_s: float = 0.0
    channel: int = 0
    is_silent: bool = False


def read_pieces(
    source: Path | Sound, file: int, *, rate: int, piece_samples: int, max_seconds: float, repeated_samples: int = 0
) -> Iterator[Piece | End]:
    """First channel of a file, resampled to `rate` as a stream, in pieces of `piece_samples`; the last item is an
    `End`. When all of the first channel is zero and another is not, it is that other one.

    The samples are those of `audio.resample(audio.load(path))`; a piece begins with the last `repeated_samples` of the
    one before. Memory is bounded by a block and a piece.
    """
    sound = Sound(str(source)) if isinstance(source, Path) else source
    level = _Level()
    num_heard = 0

    def end(reject: str = "", detail: str = "") -> End:
        silent = level.peak == 0.0
        return End(
            file=file,
            reject=reject,
            detail=detail,
            duration_s=num_heard / rate,
            channel=level.channel,
            is_silent=silent,
        )

    try:
        for piece in cut(_resampled(sound, rate, level), file, piece_samples, repeated_samples):
            num_heard += len(piece.samples_S) - piece.num_repeated
            if num_heard > max_seconds * rate:
                raise BrokenAudio(f"longer than {max_seconds:g} s", "raise the limit, or cut the recording")
            yield piece
        if not num_heard:
            raise BrokenAudio("empty audio", "it has no samples; leave it out")
    except BrokenAudio as error:
        yield end(error.reason, error.detail)
    else:
        yield end()


def read_whole(sound: Sound) -> Waveform:
    """The same sound at its own rate, in memory. Raises BrokenAudio."""
    if isinstance(sound.source, Waveform):
        return sound.source
    with _opened(sound) as (file, rate):
        blocks = list(_first_channel(file, sound, _Level()))
    if not blocks:
        raise BrokenAudio("empty audio", "it has no samples; leave it out")
    return Waveform(samples_S=np.concatenate(blocks), sample_rate=rate)


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


@dataclass
class _Level:
    """What was found out about a recording on the way: the loudest sample, and the channel that it was taken from."""

    peak: float = 0.0
    channel: int = 0


def _resampled(sound: Sound, rate: int, level: _Level) -> Iterator[np.ndarray]:
    """First channel at `rate`, block by block."""
    if isinstance(sound.source, Waveform):
        blocks: Iterator[np.ndarray] = iter([_checked(sound.source.samples_S, level)])
        rate_in = sound.source.sample_rate
        yield from blocks if rate_in == rate else _resample(blocks, rate_in, rate)
        return
    with _opened(sound) as (file, rate_in):
        blocks = _first_channel(file, sound, level)
        yield from blocks if rate_in == rate else _resample(blocks, rate_in, rate)


@contextmanager
def _opened(sound: Sound) -> Iterator[tuple[Any, int]]:
    """The open file and its sample rate. Raises BrokenAudio, also for what fails inside the block."""
    soundfile = audio.package("soundfile")
    if isinstance(sound.source, str) and not Path(sound.source).is_file():
        raise BrokenAudio("missing file", f"{sound.source} is missing")
    try:
        with soundfile.SoundFile(sound.source) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise BrokenAudio(
                    f"its sample rate is outside {LOWEST_RATE}..{HIGHEST_RATE} Hz", f"it is {file.samplerate} Hz"
                )
            yield file, file.samplerate
    except soundfile.LibsndfileError as error:
        raise BrokenAudio(
            f"cannot be read as audio: {error.error_string}", "convert it to WAV, FLAC, OGG or MP3, or leave it out"
        ) from error
    except OSError as error:
        raise BrokenAudio(f"cannot be read: {error.strerror}", "look at its permissions and at the disk") from error


def _first_channel(file: Any, sound: Sound, level: _Level) -> Iterator[np.ndarray]:
    """The part's samples of the first channel; of the first that is not silent, when that one is silent throughout."""
    silent: list[int] = []  # lengths of blocks that wait until it is known whether the first channel ever sounds
    sounding_C = np.zeros(file.channels, dtype=bool)
    for block_SC in _blocks(file, sound):
        first_S = _checked(block_SC[:, 0], level)
        if file.channels > 1 and level.peak == 0.0:
            silent.append(len(first_S))
            sounding_C |= block_SC.any(0)
            continue
        yield from (np.zeros(n, dtype=np.float32) for n in silent)
        silent.clear()
        yield first_S
    if sounding_C.any() and silent:
        level.channel = int(np.argmax(sounding_C))
        for block_SC in _blocks(file, sound):
            yield _checked(block_SC[:, level.channel], level)
    else:
        yield from (np.zeros(n, dtype=np.float32) for n in silent)


def _blocks(file: Any, sound: Sound) -> Iterator[np.ndarray]:
    """All channels of the part, block by block."""
    most = max(1, BLOCK_SAMPLES // file.channels)
    left = None
    if sound.end_s is not None or sound.start_s:
        start = round(sound.start_s * file.samplerate)
        if start >= file.frames:
            raise BrokenAudio(
                "a segment behind the end of its file", f"it starts at {sound.start_s:g} s; mend its times"
            )
        file.seek(start)
        left = None if sound.end_s is None else round(sound.end_s * file.samplerate) - start
    elif file.tell():
        file.seek(0)
    while len(block_SC := file.read(most if left is None else min(most, left), dtype="float32", always_2d=True)):
        yield block_SC
        if left is not None:
            left -= len(block_SC)


def _checked(samples_S: np.ndarray, level: _Level) -> np.ndarray:
    samples_S = np.ascontiguousarray(samples_S, dtype=np.float32)
    if not np.isfinite(samples_S).all():
        raise BrokenAudio("audio holds samples that are NaN or infinite", "decode or record it again")
    peak = float(np.abs(samples_S).max(initial=0.0))
    if peak > LOUDEST:
        raise BrokenAudio(f"audio holds samples beyond {LOUDEST:g} times full scale", "decode or record it again")
    level.peak = max(level.peak, peak)
    return samples_S


def _resample(blocks: Iterable[np.ndarray], rate_in: int, rate: int) -> Iterator[np.ndarray]:
    stream = audio.package("soxr").ResampleStream(rate_in, rate, 1, dtype="float32")
    for samples_S in blocks:
        yield stream.resample_chunk(samples_S)
    yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
