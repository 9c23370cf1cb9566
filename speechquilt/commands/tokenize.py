"""`speechquilt tokenize IN OUT --tokenizer RUN`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat, Positional
from speechquilt.jobs.execution import Execution
from speechquilt.jobs.tokenize_audio import TokenizeSettings, tokenize_folder


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Audio of any amount, length and rate -> shards of speech documents.

    Transcripts come from x.txt beside x.wav, or from metadata.jsonl / .csv (file_name, text, words). What has one also
    becomes ASR and TTS pairs, what has word times becomes spoken texts for parallel interleaving. Recordings that cannot be
    used are counted in speech/rejects.jsonl with their reasons. The same command goes on after a kill;
    docs/how-to/tokenize.md tells more.
    """

    input: Positional[Path]
    """Folder of audio, or a .jsonl or .parquet table with a column `path`."""
    output: Positional[Path]
    """Folder to make; each kind of document is a folder of shards in it."""
    tokenizer: Path
    """Run of `train tokenizer`, or the folder of a released tokenizer."""
    text_tokenizer: Path | None = None
    """Text tokenizer of the pairs, that of the model to be trained: a Hugging Face folder with tokenizer.json, or such a file; none:
    the one in the speech tokenizer's folder, or no pairs when there is none."""
    settings: Flat[TokenizeSettings] = TokenizeSettings()
    """How recordings are read and encoded."""
    execution: Flat[Execution] = Execution()
    """Where the work is done."""

    def run(self) -> None:
        tokenize_folder(
            self.input,
            self.output,
            self.tokenizer,
            self.settings,
            self.execution,
            text_tokenizer=self.text_tokenizer,
        )
