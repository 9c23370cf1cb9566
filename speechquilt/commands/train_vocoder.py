"""`speechquilt train vocoder`."""

from dataclasses import dataclass
from pathlib import Path

from speechquilt.commands.grammar import Flat
from speechquilt.config import nearest
from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.files import write_json
from speechquilt.recipes import catalog, defaults
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_vocoder import VocoderRecipe, train_vocoder
from speechquilt.train import distributed

TOY = "toy"
PREFIX = "vocoder_"  # of a recipe's name
PRESETS = (
    TOY,
    *(name.removeprefix(PREFIX) for name, entry in catalog.ENTRIES.items() if entry.kind == "vocoder"),
)
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class TrainVocoder:
    """Train a vocoder: mel frames in, sound out. It needs recordings alone, no transcripts and no tokenizer.

    Also under torchrun. The same command goes on after a kill.
    """

    STARTS = ("preset",)

    preset: str = TOY
    """Recipe to start from: toy, minutes on two CPU cores; 22khz, with discriminators on one GPU. Other flags change it."""
    speech: str = ""
    """Folder of audio; one recording in twenty is held out."""
    run_dir: str = "runs/vocoder"
    """Folder of the run; it becomes the vocoder."""
    recipe: Flat[VocoderRecipe] = defaults.VOCODER
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = TOY) -> "TrainVocoder":
        """Raises ValueError naming the known presets."""
        preset = preset.removeprefix(PREFIX)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; {nearest(preset, PRESETS)}")
        return cls(preset=preset, recipe=defaults.VOCODER if preset == TOY else catalog.load(PREFIX + preset).recipe)

    def run(self) -> None:
        try:
            corpus = FolderCorpus(required("speech", self.speech), need_text=False)
            folder = Path(self.run_dir)
            with remembered(self, folder, writes=distributed.rank() == 0):
                found = train_vocoder(self.recipe, corpus, folder)
            if distributed.rank() == 0:
                write_json(folder / RESULTS_FILE, found)
                report(found, folder, f'vocoder_folder.load("{folder}") in Python')
        finally:
            distributed.stop()
