"""`speechquilt interleave CORPUS OUT --text-to-token RUN`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat, Positional
from speechquilt.data.interleaving.synthetic import InterleaveConfig
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.interleave_text import InterleaveSettings, interleave_corpus


@dataclass(frozen=True, kw_only=True)
class Interleave:
    """Plain text of any amount -> shards of documents in which spans of the text are speech tokens.

    The output is one folder of shards; stats.json in it has the realised ratio, what was left as text and why, and the noise
    of the synthetic speech. Broken documents are counted in rejects.jsonl. The same command goes on after a kill;
    docs/how-to/interleave.md tells more.
    """

    corpus: Positional[str]
    """Folder or file of text, .jsonl, .parquet, .arrow, or hub:NAME."""
    output: Positional[Path]
    """Folder of shards to make."""
    text_to_token: Path
    """Run of `train text_to_token`."""
    tokenizer: Path | None = None
    """Run of the speech tokenizer; it reads spans back, which measures the noise."""
    text_tokenizer: Path | None = None
    """Text tokenizer of the documents, that of the model to be trained: a Hugging Face folder with tokenizer.json, or such a file; none:
    that of the text-to-token model, which speaks with its own in any case."""
    rule: Flat[InterleaveConfig] = InterleaveConfig()
    """Which words become speech."""
    settings: Flat[InterleaveSettings] = InterleaveSettings()
    """How the corpus is read and spoken."""
    execution: Flat[Execution] = Execution()
    """Where the work is done."""

    def run(self) -> None:
        interleave_corpus(
            self.corpus,
            self.output,
            self.text_to_token,
            tokenizer=self.tokenizer,
            text_tokenizer=self.text_tokenizer,
            rule=self.rule,
            settings=self.settings,
            execution=self.execution,
        )
