"""`speechquilt train entropy`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from speechquilt.commands.grammar import Flat
from speechquilt.commands.train_lm import tokenizers_and_shards
from speechquilt.model import ladder
from speechquilt.recipes import defaults
from speechquilt.stages.stage import remembered, report
from speechquilt.stages.train_entropy import MADE, EntropyRecipe, train_entropy
from speechquilt.train import distributed


@dataclass(frozen=True, kw_only=True)
class TrainEntropy:
    """Train the small speech model whose entropy says where patches end, and find the threshold for a wanted patch size.

    What it prints at its end turns on entropy patching in `speechquilt train lm`.
    """

    STARTS = ("preset",)

    preset: str = "toy"
    """Size to start from: toy, or 420M to 7B."""
    data: dict[str, str] = field(default_factory=dict)
    """Sources with speech: name=FOLDER of shards."""
    tokenizer: str = "runs/tokenizer"
    """Folder of the speech tokenizer that made the shards, trained or released."""
    text_tokenizer: str = ""
    """Text tokenizer of the shards: a Hugging Face folder with tokenizer.json, or such a file; none: the one in the speech
    tokenizer's folder."""
    run_dir: str = "runs/entropy"
    """Folder of the run."""
    recipe: Flat[EntropyRecipe] = defaults.ENTROPY
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = "toy") -> "TrainEntropy":
        """Raises ValueError naming the known sizes."""
        return cls(preset=preset, recipe=replace(defaults.ENTROPY, model=ladder.plain(preset)))

    def run(self) -> None:
        try:
            given = tokenizers_and_shards(self.tokenizer, self.text_tokenizer, self.data)
            folder = Path(self.run_dir)
            with remembered(self, folder, writes=distributed.rank() == 0):
                found = train_entropy(self.recipe, given.shards, given.text, folder)
            if distributed.rank() == 0:
                flags = f"--patcher.kind entropy --patcher.entropy {folder / MADE}"
                report(found, folder, f"speechquilt train lm ... {flags}")
        finally:
            distributed.stop()
