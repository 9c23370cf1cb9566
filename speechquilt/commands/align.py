"""`speechquilt align IN OUT --aligner RUN`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat, Positional
from speechquilt.jobs.align_audio import AlignSettings, align_folder
from speechquilt.jobs.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Align:
    """Transcribed audio of any amount and length -> metadata.jsonl with the times of its words.

    What has word times keeps them. Recordings that cannot be aligned are left out and listed in aligned/rejects.jsonl with
    their reasons. The same command goes on after a kill; docs/how-to/align.md tells more.
    """

    input: Positional[Path]
    """Folder of audio, or a .jsonl or .parquet table with a column `path`."""
    output: Positional[Path]
    """Folder to make; the readers of a folder of speech take it."""
    aligner: Path
    """Run of `train aligner`, or a Hugging Face Wav2Vec2ForCTC folder."""
    settings: Flat[AlignSettings] = AlignSettings()
    """How recordings are read and aligned."""
    execution: Flat[Execution] = Execution()
    """Where the work is done."""

    def run(self) -> None:
        align_folder(self.input, self.output, self.aligner, self.settings, self.execution)
