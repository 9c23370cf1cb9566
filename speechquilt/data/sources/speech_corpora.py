"""Transcribed speech that stays on disk: folders, Hugging Face audio datasets, lhotse manifests, behind one protocol.

`entry` tells length and text without decoding, `corpus[i]` decodes one recording when its batch is due.
Trap: an entry's duration is what a header or a manifest promises. It is good enough to plan batches; what is decoded
may be broken or of another length, and only then is it known.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from speechquilt import audio
from speechquilt.data.sources import cuts
from speechquilt.data.sources.faults import BrokenAudio, BrokenText
from speechquilt.data.sources.folders import walk
from speechquilt.data.sources.speech_folder import folder_rows, read_row
from speechquilt.data.sources.speech_rows import detail_of, is_silent, root_of, sound_of, text_of
from speechquilt.data.sources.tables import AUDIO_SUFFIXES
from speechquilt.types import Reject, Row, Utterance, Waveform

INT16_SCALE = 32767.0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a recording before it is decoded."""

    id: str
    text: str
    duration_s: float


@runtime_checkable
class SpeechCorpus(Protocol):
    """Recordings by number. Both methods may be called from several threads at once."""

    def __len__(self) -> int: ...

    def entry(self, index: int) -> Entry | Reject:
        """The same answer every time; a Reject for what is known to be of no use."""
        ...

    def __getitem__(self, index: int, /) -> Utterance:
        """Raises ValueError or OSError when the recording cannot be used."""
        ...


class UtteranceList:
    """Utterances that are in memory already, kept at 16 kHz as int16; what cannot be used is a Reject from the start."""

    def __init__(self, utterances: Iterable[Utterance]) -> None:
        self._kept: list[Utterance | Reject] = []
        self._samples: list[np.ndarray] = []
        for utterance in utterances:
            self._add(utterance)

    def __len__(self) -> int:
        return len(self._kept)

    def entry(self, index: int) -> Entry | Reject:
        kept = self._kept[index]
        if isinstance(kept, Reject):
            return kept
        return Entry(id=kept.id, text=kept.text, duration_s=len(self._samples[index]) / audio.SAMPLE_RATE)

    def __getitem__(self, index: int, /) -> Utterance:
        kept = self._kept[index]
        if isinstance(kept, Reject):
            raise ValueError(kept.reason)
        waveform = Waveform(samples_S=from_int16(self._samples[index]), sample_rate=audio.SAMPLE_RATE)
        return Utterance(id=kept.id, text=kept.text, audio=waveform, alignment=kept.alignment)

    def _add(self, utterance: Utterance) -> None:
        try:
            samples_S = to_int16(at_16_khz(utterance.audio))
        except ValueError as error:
            self._kept.append(Reject(id=utterance.id, reason=str(error)))
            self._samples.append(np.zeros(0, np.int16))
            return
        empty = Waveform(samples_S=np.zeros(0, np.float32), sample_rate=audio.SAMPLE_RATE)
        self._kept.append(Utterance(id=utterance.id, text=utterance.text, audio=empty, alignment=utterance.alignment))
        self._samples.append(samples_S)


class FolderCorpus:
    """The folders and tables of `speech_folder.read_utterances`, decoded one at a time. A `duration` in the table (seconds) spares the look into
    the file's header. `need_text` False: recordings without a transcript are used too.

    Raises FileNotFoundError when the folder is missing, ValueError when it lists nothing.
    """

    def __init__(self, folder: Path | str, *, need_text: bool = True) -> None:
        self.folder, self._need_text = root_of(Path(folder)), need_text
        self._rows = [_with_text(self.folder, row, need_text) for row in folder_rows(Path(folder))]

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, index: int) -> Entry | Reject:
        row = self._rows[index]
        if isinstance(row, Reject):
            return row
        return _entry(row["id"], row["text"], lambda: self._duration_s(row), self._need_text)

    def __getitem__(self, index: int, /) -> Utterance:
        row = self._rows[index]
        read = row if isinstance(row, Reject) else read_row(self.folder, row, self._need_text)
        if isinstance(read, Reject):
            raise BrokenAudio(read.reason, read.detail)
        return read

    def _duration_s(self, row: Row) -> float:
        if "end" in row:
            return row["end"] - row["start"]
        if "duration" in row:
            return row["duration"]
        try:
            sound = sound_of(self.folder, row)
        except BrokenAudio as error:
            raise BrokenAudio(error.reason, detail_of(row, error)) from error
        return _header_duration_s(sound.source)


def _with_text(folder: Path, row: Row, need_text: bool) -> Row | Reject:
    """The row with its transcript, which may lie in a file of its own; "" for one that is missing and not needed."""
    if "reject" in row:
        return Reject(id=row["id"], reason=row["reject"], detail=row["detail"])
    try:
        return {**row, "text": text_of(folder, row)}
    except BrokenText as error:
        if not need_text:
            return {**row, "text": ""}
        return Reject(id=row["id"], reason=error.reason, detail=detail_of(row, error))


class DatasetCorpus:
    """A split of a Hugging Face audio dataset (`datasets.Dataset`, not a streaming one), decoded by soundfile.

    `text_column`, `audio_column`: where transcript and audio are. `duration_column`: seconds, when the dataset has them;
    without it every header is read once. Raises ValueError naming a column that is not there.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        text_column: str = "text",
        audio_column: str = "audio",
        duration_column: str | None = None,
    ) -> None:
        datasets = cuts.need("datasets")
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(
                f"a datasets.Dataset is needed, not {type(dataset).__name__}: choose a split, without streaming=True"
            )
        for key, column in (("text", text_column), ("audio", audio_column), ("duration", duration_column)):
            if column is not None and column not in dataset.column_names:
                raise ValueError(
                    f"{key}_column={column!r} is not a column of the dataset; it has {', '.join(dataset.column_names)}"
                )
        self._text, self._audio, self._duration = text_column, audio_column, duration_column
        self._audio_rows = dataset.select_columns([audio_column]).cast_column(
            audio_column, datasets.Audio(decode=False)
        )
        plain = [column for column in (text_column, duration_column) if column is not None]
        self._plain_rows = dataset.select_columns(plain)

    @classmethod
    def load(cls, name: str, *, split: str = "train", **columns: Any) -> "DatasetCorpus":
        """A folder of `Dataset.save_to_disk`, or whatever `datasets.load_dataset` knows by this name or path."""
        datasets = cuts.need("datasets")
        if (Path(name) / "state.json").is_file():
            return cls(datasets.load_from_disk(name), **columns)
        if (Path(name) / "dataset_dict.json").is_file():
            return cls(datasets.load_from_disk(str(Path(name) / split)), **columns)
        if _is_audio_folder(Path(name)):
            raise ValueError(
                f'{name} is a folder of audio files, not a data set; give it as {{"kind": "folder", "path": "{name}"}}'
            )
        return cls(datasets.load_dataset(name, split=split), **columns)

    def __len__(self) -> int:
        return len(self._plain_rows)

    def entry(self, index: int) -> Entry | Reject:
        row = self._plain_rows[index]
        return _entry(str(index), row[self._text], lambda: self._duration_s(index, row))

    def __getitem__(self, index: int, /) -> Utterance:
        text = self._plain_rows[index][self._text] or ""
        return Utterance(id=str(index), text=text, audio=_decode(self._source(index)))

    def _duration_s(self, index: int, row: dict[str, Any]) -> float:
        if self._duration is not None and row[self._duration]:
            return float(row[self._duration])
        return _header_duration_s(self._source(index))

    def _source(self, index: int) -> str | io.BytesIO:
        """The file's content where the dataset holds it, else its path."""
        cell = self._audio_rows[index][self._audio] or {}
        if cell.get("bytes") is not None:
            return io.BytesIO(cell["bytes"])
        if cell.get("path"):
            return str(cell["path"])
        raise ValueError("no audio in this row: neither bytes nor a path")


def _is_audio_folder(path: Path) -> bool:
    """`datasets` reads such folders too, but encodes all of their audio again, for which it needs torchcodec."""
    if not path.is_dir():
        return False
    return any(Path(name).suffix.lower() in AUDIO_SUFFIXES for _, names in walk(path) for name in names)


class CutCorpus:
    """lhotse cuts: the first channel of each, the texts of its supervisions in order of time, their word times when all of
    them are aligned (`alignment` names the kind). The manifest is held in memory.

    A cut that ends inside a supervision is a Reject: its text says more than is heard. Cuts longer than a batch are left out
    by the loader. `CutSet.trim_to_supervisions` mends both.
    """

    def __init__(self, cut_set: Iterable[Any], *, alignment: str = "word") -> None:
        cuts.need("lhotse")
        self._alignment = alignment
        self._cuts = list(cut_set)

    @classmethod
    def load(cls, path: Path | str, *, alignment: str = "word") -> "CutCorpus":
        """A manifest file (cuts.jsonl.gz and the like). Raises FileNotFoundError when it is missing."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is missing; give a manifest of cuts, for example cuts.jsonl.gz")
        return cls(cuts.load_cuts(path), alignment=alignment)

    def __len__(self) -> int:
        return len(self._cuts)

    def entry(self, index: int) -> Entry | Reject:
        cut = self._cuts[index]
        said = cuts.said_in(cut)
        if cuts.reaches_out(cut, said):
            return Reject(id=cut.id, reason=cuts.OUT_OF_CUT)
        return _entry(cut.id, cuts.transcript(said), lambda: float(cut.duration))

    def __getitem__(self, index: int, /) -> Utterance:
        cut = self._cuts[index]
        said = cuts.said_in(cut)
        words = cuts.word_times(said, self._alignment)
        return Utterance(id=cut.id, text=cuts.transcript(said), audio=cuts.heard(cut), alignment=words)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Corpora that are trained on together: `ratio[i]` recordings of `corpora[i]` for every `sum(ratio)`.

    The paper takes one supervised recording for three pseudo-labelled ones (spec 1, 2.5): `ratio=(1, 3)`.
    """

    corpora: Sequence[SpeechCorpus]
    ratio: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.ratio) != len(self.corpora) or any(not isinstance(r, int) or r < 1 for r in self.ratio):
            raise ValueError(
                f"ratio={tuple(self.ratio)} must give a whole number of at least 1 for each of {len(self.corpora)} corpora"
            )
        for number, corpus in enumerate(self.corpora):
            if not len(corpus):
                raise ValueError(f"corpus number {number} of the mix is empty; leave it out or fill it")


def at_16_khz(waveform: Waveform) -> np.ndarray:
    """Checked samples at the tokenizers' rate. Raises ValueError on audio that cannot be used."""
    return audio.resample(audio.check(waveform), audio.SAMPLE_RATE).samples_S


def to_int16(samples_S: np.ndarray) -> np.ndarray:
    """Half the memory; `from_int16` and back again changes nothing."""
    return np.round(np.clip(samples_S, -1, 1) * INT16_SCALE).astype(np.int16)


def from_int16(samples_S: np.ndarray) -> np.ndarray:
    return samples_S.astype(np.float32) / INT16_SCALE


def _entry(id: str, text: Any, duration_s: Any, need_text: bool = True) -> Entry | Reject:
    """`duration_s()` is asked last, because a header may have to be read for it."""
    text = text.strip() if isinstance(text, str) else ""
    if need_text and not text:
        return Reject(id=id, reason="no transcript", detail=f"{id}: a transcript is needed here")
    if need_text and is_silent(text):
        return Reject(id=id, reason="no words in the transcript", detail=f"{id}: it says {text[:60]!r}")
    try:
        return Entry(id=id, text=text, duration_s=duration_s())
    except BrokenAudio as error:
        return Reject(id=id, reason=error.reason, detail=error.detail)
    except (ValueError, OSError) as error:
        return Reject(id=id, reason=str(error))


def _header_duration_s(source: str | io.BytesIO) -> float:
    soundfile = audio.package("soundfile")
    try:
        info = soundfile.info(source)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be read as audio ({error})") from error
    return info.frames / info.samplerate


def _decode(source: str | io.BytesIO) -> Waveform:
    """First channel, at the file's own rate."""
    if isinstance(source, str):
        return audio.check(audio.load(source))
    soundfile = audio.package("soundfile")
    try:
        samples_SC, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be read as audio ({error})") from error
    return audio.check(Waveform(samples_S=audio.first_channel(samples_SC), sample_rate=rate))
