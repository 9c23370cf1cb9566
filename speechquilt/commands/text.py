"""`speechquilt text CORPUS OUT --text-tokenizer FOLDER`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat, Positional
from speechquilt.jobs.encode_text import TextSettings, encode_corpus
from speechquilt.jobs.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain text of any amount -> shards of text documents.

    Broken documents are counted in rejects.jsonl. The same command goes on after a kill; docs/how-to/interleave.md tells what
    a corpus may be.
    """

    corpus: Positional[str]
    """Folder or file of text, .jsonl, .parquet, .arrow, or hub:NAME."""
    output: Positional[Path]
    """Folder of shards to make."""
    text_tokenizer: Path | None = None
    """Text tokenizer of the model to be trained: a Hugging Face folder with tokenizer.json, or such a file; none: the one in the
    speech tokenizer's folder."""
    tokenizer: Path | None = None
    """Speech tokenizer of the model to be trained, so that the shards say it; none: they fit to any."""
    settings: Flat[TextSettings] = TextSettings()
    """How the corpus is read."""
    execution: Flat[Execution] = Execution()
    """Where the work is done."""

    def run(self) -> None:
        encode_corpus(self.corpus, self.output, self.text_tokenizer, self.tokenizer, self.settings, self.execution)
