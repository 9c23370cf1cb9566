"""`speechquilt train aligner`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat
from speechquilt.files import write_json
from speechquilt.stages.corpus import folder_corpus
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_aligner import OWN_ALIGNER, RESULTS_FILE, AlignerRecipe, train_aligner
from speechquilt.train import distributed


@dataclass(frozen=True, kw_only=True)
class TrainAligner:
    """Train an aligner on your own recordings: it finds the times of words in recordings that have a transcript alone.

    Where the metadata has word times, they set the shift of the boundaries and the measured error. The same command goes on
    after a kill.
    """

    speech: str = ""
    """Folder of audio with transcripts; one recording in twenty is held out."""
    run_dir: str = "runs/aligner"
    """Folder of the run."""
    recipe: Flat[AlignerRecipe] = OWN_ALIGNER
    """What is trained, and how."""

    def run(self) -> None:
        try:
            corpus = folder_corpus(required("speech", self.speech), None)
            folder = Path(self.run_dir)
            with remembered(self, folder, writes=distributed.rank() == 0):
                found = train_aligner(self.recipe, corpus.sentences, corpus.held_out, folder)
            if distributed.rank() == 0:
                write_json(folder / RESULTS_FILE, found)
                report(found, folder, f"speechquilt align {self.speech} ALIGNED --aligner {folder}")
        finally:
            distributed.stop()
