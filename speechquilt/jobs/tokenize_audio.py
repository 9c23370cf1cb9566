"""`speechquilt tokenize`: any amount of audio -> shards of speech documents, pairs and spoken texts.

A `bulk.Work` whose tasks read ahead, batch pieces by length and write what is known of each recording.
Trap: audio longer than a window of the tokenizer is read as its windows, each with the context that it carries from the one
before (none in released tokenizers: spec 1, 2.6). So the pieces of one recording overlap, may lie in different batches and still
give the tokens of the whole.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from speechquilt.data.shards.documents import ShardWriter
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.shards.spoken import SpokenWriter
from speechquilt.data.sources import audio_files, speech_rows
from speechquilt.data.sources.audio_files import End, Piece
from speechquilt.data.sources.faults import BrokenAudio, BrokenText
from speechquilt.data.sources.speech_folder import silence
from speechquilt.data.sources.word_times import words_of
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Output, TaskWriter
from speechquilt.jobs.execution import Execution
from speechquilt.nn.batching import longest_first
from speechquilt.nn.hub import local_folder
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import aligned_tokens, encode_batch, load_text_tokenizer, own_text_tokenizer
from speechquilt.stages.training_documents import pair_documents, speech_documents, spoken_texts, text_fingerprint
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import loading
from speechquilt.tokenizer.token_encoder import TokenEncoder
from speechquilt.types import AlignedTokens, Document, Row, Segment, Utterance, Waveform

CPU_BATCH_SECONDS = 24.0  # more leaves the caches of a core (benchmarks/bulk_tokenize.py --batch-seconds)
CUDA_BATCH_SECONDS = 1920.0  # 64 windows of 30 s
POOL_BATCHES = 8  # batches' worth of audio that are sorted by length together
WHOLE_S = 30.0  # longest clip that goes through `encode` in a tokenizer whose windows overlap

DType = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """How recordings are read and encoded."""

    device: Device = "auto"
    """What the tokenizer runs on; auto: a GPU when there is one."""
    dtype: DType = "float32"
    """Of matrix products; bfloat16 is faster on a GPU and changes some tokens."""
    batch_seconds: float | None = None
    """Audio in one forward pass, padding included, in seconds; none: 24, on a GPU 1920."""
    max_seconds: float = float("inf")
    """Longer recordings are rejected, in seconds."""
    readers: int = 2
    """Threads of each worker that read and resample ahead of the encoder."""
    files_per_shard: int = 1000
    """Recordings in one task, which makes one shard of each kind."""

    def __post_init__(self) -> None:
        if self.readers < 1:
            raise ValueError(f"readers={self.readers} must be at least 1")
        if (self.batch_seconds is not None and self.batch_seconds <= 0) or self.max_seconds <= 0:
            raise ValueError(f"batch_seconds={self.batch_seconds} and max_seconds={self.max_seconds} must be positive")


@dataclass(frozen=True, kw_only=True)
class TokenizeWork:
    """What every worker needs to know; implements `bulk.Work`. `root`: what paths are relative to; `tokenizer`: its folder;
    `text_tokenizer`: folder or file of the one that pairs are made with ("": the tokenizer's own)."""

    root: str
    tokenizer: str
    text_tokenizer: str = ""
    settings: TokenizeSettings = TokenizeSettings()

    @property
    def unit(self) -> str:
        return "s audio"

    def open(self, worker: int) -> "TokenizeTask":
        device = device_of(self.settings.device, worker)
        tokenizer: Any = loading.load(self.tokenizer)
        return TokenizeTask(self, tokenizer.to(device), device, texts_of(tokenizer, self.text_tokenizer))


class TokenizeTask:
    """The task function: a slice of the list of recordings -> documents."""

    def __init__(
        self, work: TokenizeWork, tokenizer: SpeechTokenizer, device: str, text_tokenizer: TextTokenizer | None
    ) -> None:
        self.work, self.tokenizer, self.root = work, tokenizer, Path(work.root)
        self.device = device
        self.batch_seconds = work.settings.batch_seconds or (
            CUDA_BATCH_SECONDS if device.startswith("cuda") else CPU_BATCH_SECONDS
        )
        self.text_tokenizer = text_tokenizer

    def __call__(self, items: Sequence[Row], out: TaskWriter) -> None:
        events = audio_files.read_ahead(list(enumerate(items)), self._read, threads=self.work.settings.readers)
        for end, ids_T in encode_stream(
            self.tokenizer, events, self.batch_seconds, self.device, self.work.settings.dtype
        ):
            self._write(items[end.file], end, ids_T, out)
            out.tell(1, end.duration_s)

    def _read(self, source: tuple[int, Row]) -> Iterator[Piece | End]:
        """Runs in a thread; a transcript beside the audio is read here too."""
        number, item = source
        if "reject" in item:
            yield End(file=number, reject=item["reject"], detail=item["detail"])
            return
        try:
            item["text"] = speech_rows.text_of(self.root, item)
        except BrokenText as error:
            item["text"], item["words"] = "", None
            item["text_fault"] = [error.reason, speech_rows.detail_of(item, error)]
        try:
            sound = speech_rows.sound_of(self.root, item)
        except BrokenAudio as error:
            yield End(file=number, reject=error.reason, detail=error.detail)
            return
        yield from audio_files.read_pieces(
            sound,
            number,
            rate=self.tokenizer.sample_rate,
            max_seconds=self.work.settings.max_seconds,
            **piece_sizes(self.tokenizer),
        )

    def _write(self, item: Row, end: End, ids_T: np.ndarray, out: TaskWriter) -> None:
        if "reject" in item:
            out.reject(item["id"], item["reject"], item["detail"])
            return
        try:
            _check(item, end)
            tokens = _aligned_tokens(item, ids_T, self.tokenizer.frame_rate, end.duration_s)
        except BrokenAudio as error:
            out.reject(item["id"], error.reason, speech_rows.detail_of(item, error))
            return
        if item.get("text_fault"):  # the pair goes, the speech stays
            out.reject(item["id"], *item["text_fault"])
        if end.channel:
            out.count({"other_channel": 1})
        if end.is_silent:
            out.count({"silent": 1})
        self._write_documents(tokens, out)

    def _write_documents(self, tokens: AlignedTokens, out: TaskWriter) -> None:
        if not tokens.text:
            segment = Segment(modality="speech", ids_T=tokens.ids_T)  # where its units end is unknown
            out.write("speech", Document(id=tokens.id, source="speech", segments=(segment,)))
            return
        for document, text in speech_documents([tokens]):
            out.write("speech", document, text)
        if self.text_tokenizer is not None:
            for task in ("asr", "tts"):
                for document, text in pair_documents(task, [tokens], self.text_tokenizer):
                    out.write(task, document, text)
        for spoken, text in spoken_texts([tokens]):
            out.write("parallel", spoken, text)


def texts_of(tokenizer: SpeechTokenizer, given: str | Path | None) -> TextTokenizer | None:
    """What spells the texts of pairs: the text tokenizer at `given`, else the speech tokenizer's own; released ones have none."""
    return load_text_tokenizer(Path(given)) if given else own_text_tokenizer(tokenizer)


def outputs_of(tokenizer: SpeechTokenizer, text_tokenizer: TextTokenizer | None) -> dict[str, Output]:
    """The folders that a job makes. Without a text tokenizer there are no pairs."""
    info = ShardInfo(
        num_text=text_tokenizer.size if text_tokenizer else 0,
        num_speech=tokenizer.vocab_size,
        text_fingerprint=text_fingerprint(text_tokenizer) if text_tokenizer else "",
        speech_fingerprint=tokenizer.fingerprint,
        made_by={"stage": "tokenize"},
    )
    names = ("speech", "asr", "tts") if text_tokenizer else ("speech",)
    spoken = Output(writer=SpokenWriter, info=replace(info, num_text=0, text_fingerprint=""))
    return {**{name: Output(writer=ShardWriter, info=info) for name in names}, "parallel": spoken}


def piece_sizes(tokenizer: SpeechTokenizer) -> dict[str, int]:
    """`piece_samples` and `repeated_samples` of `audio_files.read_pieces`: the tokenizer's windows, when each can be
    encoded from its own samples."""
    if isinstance(tokenizer, TokenEncoder):
        return {"piece_samples": tokenizer.window_samples, "repeated_samples": tokenizer.context_samples}
    return {"piece_samples": round(WHOLE_S * tokenizer.sample_rate), "repeated_samples": 0}


def encode_stream(
    tokenizer: SpeechTokenizer,
    events: Iterable[Piece | End],
    batch_seconds: float,
    device: str = "cpu",
    dtype: DType = "float32",
) -> Iterator[tuple[End, np.ndarray]]:
    """Pieces of recordings -> each recording's `End` and all of its tokens (int32), in the order of the ends.

    Pieces are batched by length across recordings, a pool at a time, while a thread fills the next pool. The tokens are
    those of `tokenizer.encode` on the whole recording; of a rejected one they mean nothing.
    """
    encoder = _PoolEncoder(tokenizer, round(batch_seconds * tokenizer.sample_rate), device, dtype)
    pools = _pools(events, POOL_BATCHES * encoder.batch_samples)
    for pool in audio_files.prefetch(pools, ahead=1):
        yield from encoder(pool)


def computing_in(dtype: DType, device: str) -> torch.autocast:
    """Matrix products of this type inside; features and the choice of codes stay in float32 by themselves."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


class _PoolEncoder:
    """Encodes pools; `parts` and `states` belong to recordings that have not ended yet."""

    def __init__(self, tokenizer: SpeechTokenizer, batch_samples: int, device: str, dtype: DType) -> None:
        self.tokenizer, self.batch_samples, self.device, self.dtype = tokenizer, batch_samples, device, dtype
        self.pieces_are_windows = isinstance(tokenizer, TokenEncoder)
        self.parts: dict[int, list[np.ndarray]] = defaultdict(list)
        self.states: dict[int, Any] = {}

    def __call__(self, pool: Sequence[Piece | End]) -> Iterator[tuple[End, np.ndarray]]:
        ends = [event for event in pool if isinstance(event, End)]
        rejected = {end.file for end in ends if end.reject}
        pieces = [event for event in pool if isinstance(event, Piece) and event.file not in rejected]
        rows, stepped = self._split(pieces, {end.file for end in ends})
        for piece, ids_T in zip(rows, self._encode([piece.samples_S for piece in rows])):
            token_samples = round(self.tokenizer.sample_rate / self.tokenizer.frame_rate)
            self.parts[piece.file].append(ids_T[piece.num_repeated // token_samples :])
        for piece in stepped:
            self.parts[piece.file].append(self._step(piece.file, piece.samples_S, final=False))
        for end in ends:
            parts = self.parts.pop(end.file, [])
            if end.file in self.states:
                parts.append(self._step(end.file, np.zeros(0, dtype=np.float32), final=True))
                del self.states[end.file]
            yield end, np.concatenate([np.zeros(0, dtype=np.int32), *parts])

    def _split(self, pieces: Sequence[Piece], ended: set[int]) -> tuple[list[Piece], list[Piece]]:
        """Pieces that can be rows of a batch, and those of long recordings whose windows overlap."""
        if self.pieces_are_windows:
            return list(pieces), []
        count = Counter(piece.file for piece in pieces)
        whole = {f for f, n in count.items() if n == 1 and f in ended and f not in self.states}
        return [p for p in pieces if p.file in whole], [p for p in pieces if p.file not in whole]

    def _encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Waves -> their ids, in the order given; longest first, so that rows of a batch are of one length."""
        result: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * len(waves)
        with computing_in(self.dtype, self.device):
            for rows in longest_first([len(samples_S) for samples_S in waves], budget=self.batch_samples):
                for i, ids_T in zip(rows, encode_batch(self.tokenizer, [waves[i] for i in rows], self.device)):
                    result[i] = ids_T
        return result

    def _step(self, file: int, samples_S: np.ndarray, *, final: bool) -> np.ndarray:
        state = self.states[file] if file in self.states else self.tokenizer.init_state()
        with computing_in(self.dtype, self.device):
            ids_T, self.states[file] = self.tokenizer.step(torch.from_numpy(samples_S), state, final=final)
        return ids_T.cpu().numpy().astype(np.int32)


def _pools(events: Iterable[Piece | End], pool_samples: int) -> Iterator[list[Piece | End]]:
    pool: list[Piece | End] = []
    num_samples = 0
    for event in events:
        pool.append(event)
        num_samples += len(event.samples_S) if isinstance(event, Piece) else 0
        if num_samples >= pool_samples:
            yield pool
            pool, num_samples = [], 0
    yield pool


def _check(item: Row, end: End) -> None:
    """Raises BrokenAudio when a recording cannot be used, or does not fit what its table says of it."""
    if end.reject:
        raise BrokenAudio(end.reject, end.detail)
    speech_rows.check_length(item, end.duration_s)
    if end.is_silent and (item["text"] or item["words"]):
        raise silence()


def _aligned_tokens(item: Row, ids_T: np.ndarray, frame_rate: float, duration_s: float) -> AlignedTokens:
    """Raises BrokenAudio when its words do not fit."""
    words = words_of(item, item["text"], duration_s)
    text = item["text"] or " ".join(word.text for word in words)
    nothing = Waveform(samples_S=np.zeros(0, dtype=np.float32), sample_rate=1)  # the samples are not needed any more
    return aligned_tokens(Utterance(id=item["id"], text=text, audio=nothing, alignment=words), ids_T, frame_rate)


def device_of(name: str, worker: int) -> str:
    """Workers of one machine take its GPUs in turn. Raises ValueError when there is no such device."""
    has_cuda = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not has_cuda):
        raise ValueError(f"device={name!r} must be 'auto', 'cpu' or, on a machine with CUDA, 'cuda'")
    return f"cuda:{worker % torch.cuda.device_count()}" if has_cuda and name != "cpu" else "cpu"


def num_workers(device: str) -> int:
    """One for each GPU, else one for each core that this process may use."""
    return torch.cuda.device_count() if device_of(device, 0) != "cpu" else len(os.sched_getaffinity(0))


def tokenize_folder(
    source: Path,
    output: Path,
    tokenizer: Path,
    settings: TokenizeSettings = TokenizeSettings(),
    execution: Execution = Execution(),
    *,
    text_tokenizer: Path | None = None,
) -> None:
    """All of `source` into folders of shards under `output`: speech, and where texts are known asr, tts and parallel.

    `text_tokenizer`: what spells the texts of asr and tts; None: the tokenizer's own, without which there are no such pairs.
    The same call goes on where a killed one stopped; the shards are those of a run that was not killed, with any number of
    workers. Raises what `list_audio`, `bulk.prepare` and `bulk.merge` do.
    """
    items = speech_rows.list_audio(source)
    root = (source if source.is_dir() else source.parent).resolve()
    work = TokenizeWork(
        root=str(root),
        tokenizer=str(tokenizer.resolve()),
        text_tokenizer=str(local_folder(text_tokenizer).resolve()) if text_tokenizer else "",
        settings=settings,
    )
    decisive = {"command": "tokenize", "max_seconds": str(settings.max_seconds)}
    if settings.dtype != "float32":
        decisive["dtype"] = settings.dtype
    speech = loading.load(tokenizer)
    outputs = outputs_of(speech, texts_of(speech, text_tokenizer))
    job = bulk.prepare(output, work, decisive, outputs, items, items_per_task=settings.files_per_shard)
    _report(execution.run(job, num_workers(settings.device)), output)


def _report(counts: dict[str, int] | None, output: Path) -> None:
    if counts is None:
        print(f"\nsubmitted; the shards will be in {output}. Give the same command again to start what has failed")
        return
    print("\n".join(f"{name:<10} {n}" for name, n in counts.items() if n or name == "rejects"))
    print(f"\nshards   {output}\nnext     speechquilt inspect {output / 'speech'}")
