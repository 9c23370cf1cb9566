"""`speechquilt train tokenizer`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt.commands.grammar import Flat
from speechquilt.config import nearest
from speechquilt.files import write_json
from speechquilt.recipes import catalog, defaults
from speechquilt.recipes.real import sizes
from speechquilt.stages.speech_sources import Speech, SpeechSource, speech_of_folder, speech_of_sources
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.text import TextTokenizer
from speechquilt.train import distributed

TOY, REAL = "toy", "real"  # those of the two stories
PREFIX = "tokenizer_"  # of a recipe's name
PRESETS = (
    TOY,
    REAL,
    *(name.removeprefix(PREFIX) for name, entry in catalog.ENTRIES.items() if entry.kind == "tokenizer"),
)
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """Train a speech tokenizer: a codebook inside a streaming speech recogniser; 12.5 tokens per second by default.

    Either `--speech FOLDER` (audio with transcripts that fits into memory), or `--sources` and `--held-out` corpora:

      --sources kind=folder,path=my/speech kind=dataset,path=NAME,ratio=3 --held-out kind=folder,path=other/speech

    Also under torchrun. The same command goes on after a kill.
    """

    STARTS = ("preset",)

    preset: str = TOY
    """Recipe to start from: toy; real, which puts a codebook into a Whisper in an hour on two CPU cores; or the size of a
    Whisper, tiny to large. Other flags change it."""
    speech: str = ""
    """Folder of audio with transcripts; one recording in twenty is held out."""
    sources: tuple[SpeechSource, ...] = ()
    """Corpora to train on, which stay on disk."""
    held_out: tuple[SpeechSource, ...] = ()
    """Corpora to measure on."""
    held_out_recordings: int = 500
    """Usable recordings of the held-out corpora that are measured on."""
    run_dir: str = "runs/tokenizer"
    """Folder of the run."""
    recipe: Flat[TokenizerRecipe] = defaults.TOKENIZER
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = TOY) -> "TrainTokenizer":
        """Raises ValueError naming the known presets."""
        preset = preset.removeprefix(PREFIX)
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; {nearest(preset, PRESETS)}")
        stories = {TOY: defaults.TOKENIZER, REAL: sizes.TOKENIZER}
        recipe = stories[preset] if preset in stories else catalog.load(PREFIX + preset).recipe
        return cls(preset=preset, recipe=recipe)

    def run(self) -> None:
        try:
            found = self.train()
            if distributed.rank() == 0:
                report(found, Path(self.run_dir), f"speechquilt tokenize AUDIO SHARDS --tokenizer {self.run_dir}")
        finally:
            distributed.stop()

    def train(self) -> dict[str, Any]:
        """Train into `run_dir`; returns what was measured, and writes it to results.json there."""
        speech = self._speech()
        if self.preset != TOY and not self.recipe.start:
            print(
                f"  start is not set: preset={self.preset} begins from random weights, its lr is meant for a Whisper's"
            )
        # A recipe that starts from a Whisper takes its text tokenizer.
        size = self.recipe.model.text_vocab_size
        text_tokenizer = None if self.recipe.start else TextTokenizer.train(speech.texts, size)
        folder = Path(self.run_dir)
        with remembered(self, folder, writes=distributed.rank() == 0):
            found = train_tokenizer(self.recipe, text_tokenizer, speech.train, speech.held_out, folder)
        if distributed.rank() == 0:
            write_json(folder / RESULTS_FILE, found)
        return found

    def _speech(self) -> Speech:
        if self.speech and (self.sources or self.held_out):
            raise ValueError(
                f"speech={self.speech!r} and sources or held_out are both set; give one folder as --speech, or all corpora "
                "as --sources"
            )
        if not (self.sources or self.held_out):
            return speech_of_folder(required("speech", self.speech))
        return speech_of_sources(self.sources, self.held_out, self.held_out_recordings)
