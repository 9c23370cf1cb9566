"""`speechquilt inspect SHARDS`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Positional


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Statistics and readable samples of a folder of shards."""

    shards: Positional[Path]
    """Folder of shards."""
    samples: int | None = None
    """Documents to show; none: 3, on a page 12."""
    tokenizer: Path | None = None
    """Speech tokenizer that made the shards; it gives seconds, and one of ours gives words and reads speech back."""
    text_tokenizer: Path | None = None
    """Text tokenizer that made the shards, which gives words: a Hugging Face folder with tokenizer.json, or such a file; none:
    the one in the speech tokenizer's folder."""
    page: Path | None = None
    """HTML file to write the samples and figures to."""
    json: bool = False
    """Print the statistics for machines."""

    def run(self) -> None:
        from speechquilt.jobs.inspect import inspect

        inspect(
            self.shards,
            self.samples,
            tokenizer=self.tokenizer,
            text_tokenizer=self.text_tokenizer,
            page=self.page,
            as_json=self.json,
        )
