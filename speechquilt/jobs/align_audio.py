"""`speechquilt align`: transcribed audio of any amount and length -> metadata.jsonl with the times of its words.

A `bulk.Work` over lists of audio. Its cost is one pass of the aligner's network over the audio; the search behind it is small (docs/decisions/0013-alignment.md).
Trap: what has word times keeps them, as they are. To align such recordings anew, take `words` out of their metadata first.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt.aligner import AlignmentError, CTCAligner
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.shards.recordings import METADATA, AlignedFolder, AlignedRecording, AlignedWriter, write_metadata
from speechquilt.data.sources import audio_files, speech_rows
from speechquilt.data.sources.audio_files import Piece
from speechquilt.data.sources.faults import BrokenAudio
from speechquilt.data.sources.speech_folder import silence
from speechquilt.data.sources.speech_rows import Sound
from speechquilt.data.sources.word_times import check_words, words_of
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Output, TaskWriter
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.tokenize_audio import Device, device_of, num_workers
from speechquilt.stages.train_aligner import load_aligner
from speechquilt.types import Row

OUTPUT = "aligned"  # folder of shards, below the folder of the metadata
PIECE_S = 30.0  # of audio decoded at once
ALIGNER_FILES = ("config.json", "shift.json", "vocab.json", "*.safetensors")  # what decides the times


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """How recordings are read and aligned."""

    device: Device = "auto"
    """What the aligner's network runs on; auto: a GPU when there is one."""
    max_seconds: float = float("inf")
    """Longer recordings are rejected, in seconds."""
    files_per_task: int = 100
    """Recordings in one task; a kill loses at most the tasks at hand."""

    def __post_init__(self) -> None:
        if self.max_seconds <= 0:
            raise ValueError(f"max_seconds={self.max_seconds} must be positive")


@dataclass(frozen=True, kw_only=True)
class AlignWork:
    """What every worker needs to know; implements `bulk.Work`. `root`: what paths are relative to; `aligner`: its folder."""

    root: str
    aligner: str
    settings: AlignSettings = AlignSettings()

    @property
    def unit(self) -> str:
        return "s audio"

    def open(self, worker: int) -> "AlignTask":
        return AlignTask(self, load_aligner(self.aligner, device_of(self.settings.device, worker)))


class AlignTask:
    """The task function: a slice of the list of recordings -> aligned recordings, one at a time and never whole in memory."""

    def __init__(self, work: AlignWork, aligner: CTCAligner) -> None:
        self.work, self.aligner, self.root = work, aligner, Path(work.root)
        self.other_channels = 0  # recordings of this slice that were not heard in their first one

    def __call__(self, items: Sequence[Row], out: TaskWriter) -> None:
        self.other_channels = 0
        for item in items:
            try:
                recording = self._align(item)
            except BrokenAudio as error:
                out.reject(item["id"], error.reason, speech_rows.detail_of(item, error))
                out.tell(1, 0.0)
            except AlignmentError as error:
                out.reject(item["id"], error.reason, f"{item.get('where') or item['path']}: {error}")
                out.tell(1, 0.0)
            else:
                out.write(OUTPUT, recording, recording.text)
                out.tell(1, recording.duration_s)
        if self.other_channels:
            out.count({"other_channel": self.other_channels})

    def _align(self, item: Row) -> AlignedRecording:
        """Raises BrokenAudio or AlignmentError for what cannot be aligned."""
        if "reject" in item:
            raise BrokenAudio(item["reject"], item["detail"])
        if "cut" in item:
            raise BrokenAudio(
                "a cut that is not a part of one file", "save such cuts as files first (CutSet.save_audios)"
            )
        known = bool(item["words"])
        text = speech_rows.text_of(self.root, item) or (
            "" if known else speech_rows.text_of(self.root, {**item, "text": None})
        )
        if not (text or known):
            raise BrokenAudio("no transcript", "a .txt beside the audio, or `text` in its table, is needed")
        heard = _Heard(
            speech_rows.sound_of(self.root, item), self.aligner.emitter.sample_rate, self.work.settings.max_seconds
        )
        if known:
            for _ in heard:  # a broken file is no recording, whatever its table says
                pass
            words = words_of(item, text, heard.duration_s)
            text = text or " ".join(w.text for w in words)
        else:
            words = self.aligner.align_pieces(heard, text)
            check_words(words, heard.duration_s)
        speech_rows.check_length(item, heard.duration_s)
        if heard.is_silent:
            raise silence()
        self.other_channels += heard.channel > 0
        start_s = item.get("start")
        return AlignedRecording(
            id=item["id"],
            path=item["path"],
            text=text,
            duration_s=heard.duration_s,
            words=words,
            start_s=start_s,
            end_s=item.get("end"),
        )


class _Heard:
    """The samples of a file at `rate`, piece by piece, and how many there were. Raises BrokenAudio where the file is broken."""

    def __init__(self, sound: Sound, rate: int, max_seconds: float) -> None:
        self.sound, self.rate, self.max_seconds = sound, rate, max_seconds
        self.num_samples = 0
        self.is_silent, self.channel = False, 0

    @property
    def duration_s(self) -> float:
        return self.num_samples / self.rate

    def __iter__(self) -> Iterator[Any]:
        pieces = audio_files.read_pieces(
            self.sound, 0, rate=self.rate, piece_samples=round(PIECE_S * self.rate), max_seconds=self.max_seconds
        )
        for event in pieces:
            if isinstance(event, Piece):
                self.num_samples += len(event.samples_S)
                yield event.samples_S
            elif event.reject:
                raise BrokenAudio(event.reject, event.detail)
            else:
                self.is_silent, self.channel = event.is_silent, event.channel


def align_folder(
    source: Path,
    output: Path,
    aligner: Path,
    settings: AlignSettings = AlignSettings(),
    execution: Execution = Execution(),
) -> None:
    """All recordings of `source` that have a transcript -> `output`/metadata.jsonl with the times of their words.

    The same call goes on where a killed one stopped; the times are those of a run that was not killed, with any number of
    workers. Raises what `list_audio`, `load_aligner`, `bulk.prepare` and `bulk.merge` do, and ValueError for one folder as both.
    """
    items = speech_rows.list_audio(source)
    root = (source if source.is_dir() else source.parent).resolve()
    if output.resolve() == root:
        raise ValueError(f"output {output} holds the corpus itself, whose metadata would be lost; give another folder")
    load_aligner(aligner)  # a wrong folder is an error here, not in a worker
    work = AlignWork(root=str(root), aligner=str(aligner.resolve()), settings=settings)
    made_by = {"stage": "align", "aligner": _fingerprint(aligner)}
    info = ShardInfo(num_text=0, num_speech=0, text_fingerprint="", speech_fingerprint="", made_by=made_by)
    decisive = {"command": "align", "max_seconds": str(settings.max_seconds)}
    outputs = {OUTPUT: Output(writer=AlignedWriter, info=info)}
    job = bulk.prepare(output, work, decisive, outputs, items, items_per_task=settings.files_per_task)
    counts = execution.run(job, num_workers(settings.device))
    if counts is None:
        print(f"\nsubmitted; give the same command again when the queue is through with it, for {output / METADATA}")
        return
    write_metadata(output, root, AlignedFolder(output / OUTPUT).in_order())
    print("\n".join(f"{name:<10} {n}" for name, n in counts.items()))
    print(f"\nmade     {output / METADATA}\nnext     speechquilt tokenize {output} SHARDS --tokenizer RUN_OR_FOLDER")


def _fingerprint(aligner: Path) -> str:
    """12 hex digits of the files that decide the times."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ALIGNER_FILES for path in aligner.glob(pattern)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]
