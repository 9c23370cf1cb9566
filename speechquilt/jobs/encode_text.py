"""`speechquilt text`: a text corpus of any size -> shards of plain text documents, for the text part of a mixture.

A task reads its slice and encodes each document; the corpus and its slices are those of `interleave_text`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechquilt.data.shards.documents import ShardWriter
from speechquilt.data.shards.parquet import ShardInfo
from speechquilt.data.sources import text_files
from speechquilt.data.sources.text_files import TextReader
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Output, TaskWriter
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.interleave_text import check_apart
from speechquilt.jobs.tokenize_audio import num_workers
from speechquilt.nn.hub import local_folder
from speechquilt.protocols import SpeechTokenizer
from speechquilt.stages.encode import load_text_tokenizer, text_tokenizer_of
from speechquilt.stages.training_documents import text_documents, text_fingerprint
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import loading
from speechquilt.types import Reject, Row

SHARDS = "."  # the output folder is itself the folder of shards


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How a corpus is read."""

    text_column: str = "text"
    """Key or column of .jsonl, .parquet and .arrow files that holds the text."""
    max_words: int = text_files.MAX_WORDS
    """Longer documents are cut into parts of at most so many words."""
    slice_mib: float = text_files.SLICE_BYTES / 2**20
    """Text in one slice of the corpus, in MiB; a slice is the smallest piece of work."""
    slices_per_shard: int = 1
    """Slices in one task, which makes one shard."""


@dataclass(frozen=True, kw_only=True)
class TextWork:
    """What every worker needs to know; implements `bulk.Work`. `text_tokenizer`: folder or file of it."""

    reader: TextReader
    text_tokenizer: str

    @property
    def unit(self) -> str:
        return "tokens"

    def open(self, worker: int) -> "TextTask":
        return TextTask(self.reader, load_text_tokenizer(Path(self.text_tokenizer)))


class TextTask:
    """The task function: slices of a corpus -> text documents."""

    def __init__(self, reader: TextReader, tokenizer: TextTokenizer) -> None:
        self.reader, self.tokenizer = reader, tokenizer

    def __call__(self, items: Sequence[Row], out: TaskWriter) -> None:
        for item in items:
            told = 0.0
            for found, share in self.reader.read(item):
                if isinstance(found, Reject):
                    out.reject(found.id, found.reason, found.detail)
                    continue
                for document, text in text_documents([found], self.tokenizer):
                    out.write(SHARDS, document, text)
                    out.tell(share - told, document.num_tokens())
                told = share
            out.tell(1.0 - told, 0.0)


def encode_corpus(
    source: str,
    output: Path,
    text_tokenizer: Path | None = None,
    tokenizer: Path | None = None,
    settings: TextSettings = TextSettings(),
    execution: Execution = Execution(),
) -> None:
    """All of `source` (see `text_files.open_corpus`) into shards in `output`, in ids of `text_tokenizer`.

    Without one, in those of the text tokenizer in the folder of `tokenizer`, the speech tokenizer, whose name the shards carry
    when it is given. The same call goes on where a killed one stopped; the shards are those of a run that was not killed, with
    any number of workers. Raises what `open_corpus`, `bulk.prepare` and `bulk.merge` do, ValueError without a text tokenizer.
    """
    speech = loading.load(tokenizer) if tokenizer else None
    texts, where = text_tokenizer_of(speech, text_tokenizer), text_tokenizer or tokenizer
    assert where is not None  # else there would be no `texts`
    corpus = text_files.open_corpus(source)
    check_apart(Path(source), output)
    work = TextWork(
        reader=TextReader(root=str(corpus.root), text_column=settings.text_column, max_words=settings.max_words),
        text_tokenizer=str(local_folder(where).resolve()),
    )
    slices = corpus.slices(text_column=settings.text_column, slice_bytes=round(settings.slice_mib * 2**20))
    job = bulk.prepare(
        output,
        work,
        {"command": "text", "text_column": settings.text_column},
        {SHARDS: output_of(texts, speech, settings.max_words)},
        slices,
        items_per_task=settings.slices_per_shard,
    )
    _report(execution.run(job, num_workers("cpu")), output)


def output_of(texts: TextTokenizer, speech: SpeechTokenizer | None, max_words: int) -> Output:
    """What the shards say of themselves: the text tokenizer, and the speech tokenizer of the model that will read them."""
    info = ShardInfo(
        num_text=texts.size,
        num_speech=speech.vocab_size if speech else 0,
        text_fingerprint=text_fingerprint(texts),
        speech_fingerprint=speech.fingerprint if speech else "",
        made_by={"stage": "text", "max_words": max_words},
    )
    return Output(writer=ShardWriter, info=info)


def _report(counts: Mapping[str, int] | None, output: Path) -> None:
    if counts is None:
        print(f"\nsubmitted; the shards will be in {output}. Give the same command again to start what has failed")
        return
    print(f"documents  {counts[SHARDS]}\nrejects    {counts['rejects']}")
    print(f"\nshards   {output}\nnext     speechquilt inspect {output}")
