"""`speechquilt interleave`: a text corpus of any size -> shards of synthetic interleaved documents.

A `bulk.Work` whose items are slices of the corpus, once for each pass over it. A task reads its slice, plans the spans, has the text-to-token model speak them and assembles the documents (spec synthetic-interleaved, 5.2).
Cost: nearly all of it is the text-to-token model; after a minute the command says how much the whole corpus will take.
Trap: a task's bytes depend on the device by float noise. Tasks that are to be compared, or done again, stay on one kind.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechquilt import config
from speechquilt.counts import Counts
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.synthetic import InterleaveConfig, InterleavePlan, InterleaveStats
from speechquilt.data.shards.documents import ShardWriter
from speechquilt.data.sources import text_files
from speechquilt.data.sources.text_files import TextReader
from speechquilt.evals import noise
from speechquilt.evals.noise import NoiseMeter
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Output, TaskWriter
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.tokenize_audio import Device, DType, device_of, num_workers
from speechquilt.nn.hub import local_folder
from speechquilt.span_length import USUAL_RATE
from speechquilt.stages.encode import load_text_tokenizer
from speechquilt.stages.training_documents import shard_info, speak_spans
from speechquilt.text import TextTokenizer
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig, TextToTokenEngine
from speechquilt.text_to_token.network import Description
from speechquilt.tokenizer import loading
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.types import Reject, Row, SpokenSpan
from speechquilt.vocab import Vocab

SHARDS = "."  # the output folder is itself the folder of shards
CUDA_ROWS = 1024
ROW_TOKENS = 512  # of key-value state, for spans of the paper's length
ROUNDS = 16  # spans of one call of the engine, for each of its rows: the rows stay full, memory stays small
MOST_DOCUMENTS = 512  # in one call of the engine, where documents have few spans
NOISE_AT_LEAST = 8  # spans of a shard that are read back, however small the share


@dataclass(frozen=True, kw_only=True)
class InterleaveSettings:
    """How a corpus is read and spoken."""

    passes: int = 1
    """Times through the corpus, with other spans spoken each time."""
    text_column: str = "text"
    """Key or column of .jsonl, .parquet and .arrow files that holds the text."""
    max_words: int = text_files.MAX_WORDS
    """Longer documents are cut into parts of at most so many words."""
    slice_mib: float = text_files.SLICE_BYTES / 2**20
    """Text in one slice of the corpus, in MiB; a slice is the smallest piece of work."""
    slices_per_shard: int = 1
    """Slices in one task, which makes one shard."""
    noise_sample: float = 0.01
    """Share of the spoken spans that the speech tokenizer reads back to measure the noise, 0 to 1."""
    device: Device = "auto"
    """What the text-to-token model runs on; auto: a GPU when there is one."""
    dtype: DType = "float32"
    """Of the model's weights."""
    rows: int | None = None
    """Spans that are spoken at once; none: what suits the device (128, on a GPU 1024)."""
    temperature: float = EngineConfig.temperature
    """Of the sampling of speech tokens: 0 always takes the most likely one, 1 samples as the model predicts; lower varies
    less.
    """
    top_p: float = EngineConfig.top_p
    """Sample among the most likely tokens that together have this probability, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes={self.passes} must be at least 1")
        if self.rows is not None and self.rows < 1:
            raise ValueError(
                f"rows={self.rows} must be at least 1 span; leave it out for a number that suits the device"
            )
        if not 0 <= self.noise_sample <= 1:
            raise ValueError(f"noise_sample={self.noise_sample} must be between 0 and 1, a share of the spoken spans")
        self.engine("cpu")  # which knows the rules of sampling

    def engine(self, device: str) -> EngineConfig:
        """A GPU takes as many rows as memory allows; more rows than a core's caches hold only make it slower."""
        rows = self.rows or (EngineConfig.max_rows if device == "cpu" else CUDA_ROWS)
        return EngineConfig(
            max_rows=rows,
            cache_tokens=max(EngineConfig.cache_tokens, rows * ROW_TOKENS),
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def sampling(self) -> dict[str, Any]:
        """How the engine samples. How many rows it has is for each worker to say: the machine that prepares a job need not
        have the device of those that do it."""
        return {k: v for k, v in config.to_dict(self.engine("cpu")).items() if k not in ("max_rows", "cache_tokens")}


@dataclass(frozen=True, kw_only=True)
class InterleaveWork:
    """What every worker needs to know; implements `bulk.Work`. `text_to_token`: folder of the model that speaks; `tokenizer`:
    folder of the speech tokenizer that reads spans back ("": noise is not measured); `text_tokenizer`: folder or file of the
    one that the documents' text is written with ("": that of the model that speaks)."""

    reader: TextReader
    rule: InterleaveConfig
    text_to_token: str
    tokenizer: str = ""
    text_tokenizer: str = ""
    settings: InterleaveSettings = InterleaveSettings()

    @property
    def unit(self) -> str:
        return "tokens"

    def open(self, worker: int) -> "InterleaveTask":
        device = device_of(self.settings.device, worker)
        loaded = network.load(Path(self.text_to_token))
        ear = SupervisedTokenizer.load(Path(self.tokenizer)).to(device) if self.tokenizer else None
        model = loaded.model.to(device, getattr(torch, self.settings.dtype))
        engine = self.settings.engine(device).build(model, loaded.tokenizer)
        return InterleaveTask(self, engine, ear, texts_of(self, loaded.tokenizer))


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A document whose spans wait for the engine. `share`: of its slice that is done when it is."""

    text: str
    plan: InterleavePlan
    share: float


@dataclass(kw_only=True)
class _Tally:
    """What one task counts."""

    stats: InterleaveStats = field(default_factory=InterleaveStats)
    noise: "NoiseSample | None" = None


class InterleaveTask:
    """The task function: slices of a corpus -> interleaved documents."""

    def __init__(
        self, work: InterleaveWork, engine: TextToTokenEngine, ear: SupervisedTokenizer | None, texts: TextTokenizer
    ) -> None:
        self.work, self.engine, self.ear, self.texts = work, engine, ear, texts
        engine.shows_progress = False

    def __call__(self, items: Sequence[Row], out: TaskWriter) -> None:
        retries = self.engine.stats.retries
        tally = _Tally()
        if self.ear:
            tally.noise = NoiseSample(
                NoiseMeter(self.ear),
                self.work.settings.noise_sample,
                self.engine.tokenizer.encode,
                self.engine.frame_rate,
            )
        for item in items:
            told = 0.0
            for batch in self._batches(self._plans(item, out)):
                num_tokens = self._interleave(batch, out, tally)
                out.tell(batch[-1].share - told, num_tokens)
                told = batch[-1].share
            out.tell(1.0 - told, 0.0)
        out.count(_counts(tally, self.engine.stats.retries - retries))

    def _plans(self, item: Row, out: TaskWriter) -> Iterator[_Planned]:
        for found, share in self.work.reader.read(item):
            if isinstance(found, Reject):
                out.reject(f"{found.id}/pass{item['pass']}", found.reason, found.detail)
            else:
                plan = synthetic.plan(found.id, found.text, item["pass"], self.work.rule)
                yield _Planned(text=found.text, plan=plan, share=share)

    def _batches(self, planned: Iterator[_Planned]) -> Iterator[list[_Planned]]:
        batch: list[_Planned] = []
        num_spans = 0
        for document in planned:
            batch.append(document)
            num_spans += len(document.plan.spans)
            if num_spans >= ROUNDS * self.engine.config.max_rows or len(batch) == MOST_DOCUMENTS:
                yield batch
                batch, num_spans = [], 0
        if batch:
            yield batch

    def _interleave(self, batch: Sequence[_Planned], out: TaskWriter, tally: _Tally) -> int:
        """-> tokens of the documents written, text and speech."""
        num_tokens = 0
        for planned, spans in zip(batch, speak_spans([p.plan for p in batch], self.engine)):
            document = synthetic.assemble(
                planned.plan,
                spans,
                self.texts.encode_run,
                frame_rate=self.engine.frame_rate,
                stats=tally.stats,
                engine_encode=self.engine.tokenizer.encode,
            )
            out.write(SHARDS, document, planned.text)
            num_tokens += document.num_tokens()
            if tally.noise:
                tally.noise.add(planned.plan, spans)
        return num_tokens


class NoiseSample:
    """A seeded `share` of the spans of one task that become speech for `meter`, and at least `NOISE_AT_LEAST` of them.

    A span is drawn by its document, pass and place alone, so a task that is done again reads the same spans.
    """

    def __init__(
        self,
        meter: NoiseMeter,
        share: float,
        text_encode: Callable[[str], Sequence[int]],
        frame_rate: float = USUAL_RATE,
    ) -> None:
        self.meter, self.share, self.text_encode, self.frame_rate = meter, share, text_encode, frame_rate
        self.num_taken = 0
        self._order = count()
        self._spare: list[tuple[float, int, tuple[str, str, np.ndarray]]] = []  # heap, the largest draw first

    def add(self, plan: InterleavePlan, spans: Sequence[SpokenSpan]) -> None:
        for k, (written, spoken, span) in enumerate(zip(plan.spans, plan.spoken_spans, spans)):
            if synthetic.reject_reason(span, len(self.text_encode(spoken)), self.frame_rate):
                continue  # `assemble` leaves it as text, so its noise is nobody's
            draw = np.random.default_rng([plan.seed, k]).random()
            if draw < self.share:
                self._take(written, spoken, span.ids_T)
            else:
                push = heapq.heappush if len(self._spare) < NOISE_AT_LEAST else heapq.heappushpop
                push(self._spare, (-draw, next(self._order), (written, spoken, span.ids_T)))

    def counts(self) -> Counts:
        """To be called once, at the end of the task."""
        for _, _, span in sorted(self._spare, reverse=True)[: max(0, NOISE_AT_LEAST - self.num_taken)]:
            self._take(*span)
        return self.meter.counts()

    def _take(self, written: str, spoken: str, ids_T: np.ndarray) -> None:
        self.meter.add(written, spoken, ids_T)
        self.num_taken += 1


def _counts(tally: _Tally, retries: int) -> Counts:
    counted: Counts = {f.name: getattr(tally.stats, f.name) for f in fields(tally.stats)}
    if tally.noise:
        counted["noise"] = tally.noise.counts()
    return {**counted, "retries": retries}


def summarise(counts: Counts) -> Counts:
    """Counts of all tasks -> what `stats.json` says: the realised ratio and the noise of the whole corpus beside them."""
    rates = {"noise_rates": noise.report(counts["noise"])} if "noise" in counts else {}
    return {**counts, "ratio": counts["spoken_words"] / max(1, counts["words"]), **rates}


def interleave_corpus(
    source: str,
    output: Path,
    text_to_token: Path,
    *,
    tokenizer: Path | None = None,
    text_tokenizer: Path | None = None,
    rule: InterleaveConfig = InterleaveConfig(),
    settings: InterleaveSettings = InterleaveSettings(),
    execution: Execution = Execution(),
) -> None:
    """All of `source` (see `text_files.open_corpus`), as often as `settings.passes` says, into shards in `output`.

    The same call goes on where a killed one stopped; the shards are those of a run that was not killed, with any number of
    workers. `text_tokenizer`: what the documents' text is written with; None: that of the text-to-token model. Raises what
    `open_corpus`, `bulk.prepare` and `bulk.merge` do, ValueError when `tokenizer` is another one than the text-to-token model
    speaks for, or cannot read tokens back.
    """
    corpus = text_files.open_corpus(source)
    check_apart(Path(source), output)
    speaker = network.describe(text_to_token)
    _check_tokenizer(tokenizer, speaker)
    work = InterleaveWork(
        reader=TextReader(root=str(corpus.root), text_column=settings.text_column, max_words=settings.max_words),
        rule=rule,
        text_to_token=str(text_to_token.resolve()),
        tokenizer=str(tokenizer.resolve()) if tokenizer else "",
        text_tokenizer=str(local_folder(text_tokenizer).resolve()) if text_tokenizer else "",
        settings=settings,
    )
    slice_bytes = round(settings.slice_mib * 2**20)
    slices = (
        {**piece, "pass": p}
        for p in range(settings.passes)
        for piece in corpus.slices(text_column=settings.text_column, slice_bytes=slice_bytes)
    )
    noise_sample = settings.noise_sample if tokenizer else 0
    job = bulk.prepare(
        output,
        work,
        {"command": "interleave", "text_column": settings.text_column, "noise_sample": str(noise_sample)},
        {SHARDS: output_of(work, speaker)},
        slices,
        items_per_task=settings.slices_per_shard,
        summarise=summarise,
    )
    _report(execution.run(job, num_workers(settings.device)), output)


def output_of(work: InterleaveWork, speaker: Description) -> Output:
    """What the shards say of themselves: both tokenizers, the model that spoke, the rule and its seed."""
    texts = texts_of(work, speaker.tokenizer)
    info = shard_info(
        Vocab(num_text=texts.size, num_speech=speaker.config.num_speech),
        texts,
        speaker.speech_fingerprint,
        stage="interleave",
        text_to_token=model_fingerprint(Path(work.text_to_token)),
        passes=work.settings.passes,
        max_words=work.reader.max_words,
        **config.to_dict(work.rule),
        engine=work.settings.sampling(),
        rows=work.settings.rows,
        dtype=work.settings.dtype,
    )
    return Output(writer=ShardWriter, info=info)


def texts_of(work: InterleaveWork, own: TextTokenizer) -> TextTokenizer:
    """What the documents' text is written with; `own`: that of the model that speaks."""
    return load_text_tokenizer(Path(work.text_tokenizer)) if work.text_tokenizer else own


def model_fingerprint(folder: Path) -> str:
    """Of the weights and the settings that decide what a text-to-token model says."""
    digests = []
    for name in (network.OURS, network.WEIGHTS):
        with (folder / name).open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return config.fingerprint(digests)


def check_apart(source: Path, output: Path) -> None:
    """Raises ValueError when the shards would lie inside the corpus."""
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{output} lies inside the corpus {source}, so the next call would read its shards as text; "
            "give a folder outside of it"
        )


def _check_tokenizer(tokenizer: Path | None, speaker: Description) -> None:
    if tokenizer is None:
        return
    ear = loading.load(tokenizer)
    if ear.fingerprint != speaker.speech_fingerprint:
        raise ValueError(
            f"tokenizer={tokenizer} has fingerprint {ear.fingerprint}, the text-to-token model speaks the tokens of "
            f"{speaker.speech_fingerprint}; give the speech tokenizer that it was trained for"
        )
    if not isinstance(ear, SupervisedTokenizer):
        raise ValueError(
            f"tokenizer={tokenizer} was published without an ASR half, so its tokens cannot be read back and the noise cannot "
            "be measured; leave --tokenizer out"
        )


def _report(counts: Mapping[str, int] | None, output: Path) -> None:
    if counts is None:
        print(f"\nsubmitted; the shards will be in {output}. Give the same command again to start what has failed")
        return
    stats = json.loads((output / bulk.STATS).read_text(encoding="utf-8"))
    manifest = json.loads((output / "shards.json").read_text(encoding="utf-8"))
    for name, value in _lines(manifest, stats):
        print(f"{name:<22} {value}")
    print(f"\nshards   {output}\nnext     speechquilt inspect {output}")


def _lines(manifest: Mapping[str, Any], stats: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The clear end of the command: (what, how much)."""
    yield "documents", manifest["documents"]
    yield "rejected documents", _listed(manifest["rejects"])
    for modality, num_tokens in manifest["tokens"].items():
        yield f"{modality} tokens", num_tokens
    yield "words", stats["words"]
    yield "spoken words", f"{stats['spoken_words']} ({stats['ratio']:.1%}), in {stats['spans']} spans"
    yield "spans left as text", f"{_listed(stats['rejects'])}; {stats['retries']} spoken again"
    if stats.get("unspeakable"):
        yield "unspeakable words", _listed(stats["unspeakable"])
    rates = stats.get("noise_rates")
    if rates is None:
        yield "noise", "not measured; --tokenizer RUN reads a sample of the spans back"
    for kind, rate in (rates or {}).items():
        yield (
            f"noise, {kind}",
            f"{rate['wer']:.1%} of words wrong [{rate['low']:.1%}, {rate['high']:.1%}], {rate['spans']} spans",
        )


def _listed(reasons: Mapping[str, int]) -> str:
    """ "3: 2 empty text, 1 not JSON"."""
    total = sum(reasons.values())
    named = ", ".join(f"{n} {reason}" for reason, n in Counter(reasons).most_common())
    return f"{total}: {named}" if total else "0"
