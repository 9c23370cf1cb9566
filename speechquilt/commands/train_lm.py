"""`speechquilt train lm`, and every recipe of a language model by its name."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from speechquilt.commands.grammar import Flat
from speechquilt.config import nearest
from speechquilt.model import ladder
from speechquilt.recipes import catalog, defaults
from speechquilt.recipes.mixtures import shares, weights_of
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_lm import LMRecipe, train_lm
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed

Kind = Literal["latent", "plain"]
RECIPES = tuple(name for name, entry in catalog.ENTRIES.items() if entry.kind == "lm")


@dataclass(frozen=True, kw_only=True)
class TrainLM:
    """Train a speech-text language model on shards: plain, or latent with speech tokens grouped into patches.

      --data speech=shards/speech asr=shards/asr interleaved=shards/interleaved

    The name of a source says what is in its folder; weights, mixtures and bounds go by it. Sizes: docs/presets.md.
    Also under torchrun, for many GPUs: docs/how-to/many-gpus.md. The same command goes on after a kill.
    """

    STARTS = ("preset", "kind")

    preset: str = "toy"
    """Start from a size (toy, 420M to 7B) with the toy's schedule, or from a recipe (lst_420m); other flags change it."""
    kind: Kind = "latent"
    """Of a size: latent has patches, plain takes one step of the large model per token. A recipe knows its own."""
    data: dict[str, str] = field(default_factory=dict)
    """Sources: name=FOLDER of shards."""
    tokenizer: str = "runs/tokenizer"
    """Folder of the speech tokenizer that made the shards."""
    run_dir: str = "runs/lm"
    """Folder of the run."""
    mixture: str = ""
    """Shares of tokens by name, instead of weights: toy, interleaved_paper, interleaved_paper_b or lst_paper."""
    map_shards: bool = False
    """Read shards through an uncompressed copy beside each, for corpora larger than memory."""
    recipe: Flat[LMRecipe] = defaults.LM
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = "toy", kind: Kind = "latent") -> "TrainLM":
        """Raises ValueError naming the known sizes and recipes, or the known kinds."""
        if preset in RECIPES:
            return cls(preset=preset, run_dir=f"runs/{preset}", recipe=catalog.load(preset).recipe)
        if preset not in ladder.NAMES:
            raise ValueError(f"preset={preset!r} is unknown; {nearest(preset, [*ladder.NAMES, *RECIPES])}")
        if kind not in ("latent", "plain"):
            raise ValueError(f"kind={kind!r} must be latent or plain")
        model = ladder.plain(preset) if kind == "plain" else ladder.latent(preset)
        return cls(preset=preset, kind=kind, recipe=replace(defaults.LM, model=model))

    def run(self) -> None:
        try:
            self._run()
        finally:
            distributed.stop()

    def _run(self) -> None:
        tokenizer, shards = tokenizer_and_shards(self.tokenizer, self.data)
        recipe = replace(self.recipe, weights=weights_of(self.mixture, self.recipe.weights, self.data))
        folder = Path(self.run_dir)
        first = distributed.rank() == 0
        if first:
            print(f"mixture  {shares(recipe.weights)}")
        with remembered(self, folder, writes=first):
            found = train_lm(recipe, shards, text_tokenizer_of(tokenizer), folder, "lm", map_shards=self.map_shards)
        if first:
            tokenizer.save(folder / "tokenizer")
            report(found, folder, f"speechquilt eval {self.run_dir} ITEMS.jsonl")


def tokenizer_and_shards(tokenizer: str, data: dict[str, str]) -> tuple[SupervisedTokenizer, dict[str, Path]]:
    """What every training on shards needs. Raises ValueError when the settings do not name it."""
    if not data:
        raise ValueError("data is empty; name at least one source, for example --data speech=shards/speech")
    return SupervisedTokenizer.load(required("tokenizer", tokenizer)), {s: Path(path) for s, path in data.items()}
