"""`speechquilt train lm`, and every recipe of a language model by its name."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from speechquilt.commands.grammar import Flat
from speechquilt.config import nearest
from speechquilt.model import ladder
from speechquilt.model.plain import PlainLMConfig
from speechquilt.protocols import SpeechTokenizer
from speechquilt.recipes import catalog, defaults
from speechquilt.recipes.mixtures import shares, weights_of
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.lm_recipe import RUN
from speechquilt.stages.lm_start import made_of
from speechquilt.stages.stage import remembered, report, required
from speechquilt.stages.train_lm import TOKENIZER_DIR, LMRecipe, check_shards, train_lm
from speechquilt.text import TextTokenizer
from speechquilt.tokenizer import loading
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed

Kind = Literal["latent", "plain"]
RECIPES = tuple(name for name, entry in catalog.ENTRIES.items() if entry.kind == "lm")


@dataclass(frozen=True, kw_only=True)
class TrainLM:
    """Train a speech-text language model on shards: plain, or latent with speech tokens grouped into patches.

      --data speech=shards/speech asr=shards/asr interleaved=shards/interleaved

    The name of a source says what is in its folder; weights, mixtures and bounds go by it. Sizes: docs/presets.md.
    Also under torchrun, for many GPUs: docs/how-to/many-gpus.md. The same command goes on after a kill. More steps or
    other data for a model that is trained: --continue-from ITS_RUN, in a new --run-dir.
    """

    STARTS = ("preset", "kind", "continue_from")

    preset: str = "toy"
    """Start from a size (toy, 420M to 7B) with the toy's schedule, or from a recipe (lst_420m); other flags change it."""
    kind: Kind = "latent"
    """Of a size: latent has patches, plain takes one step of the large model per token. A recipe knows its own."""
    data: dict[str, str] = field(default_factory=dict)
    """Sources: name=FOLDER of shards."""
    tokenizer: str = "runs/tokenizer"
    """Folder of the speech tokenizer that made the shards, trained or released."""
    text_tokenizer: str = ""
    """Text tokenizer of the shards: a Hugging Face folder with tokenizer.json, or such a file; none: the one in the speech
    tokenizer's folder."""
    run_dir: str = "runs/lm"
    """Folder of the run."""
    mixture: str = ""
    """Shares of tokens by name, instead of weights: toy, interleaved_paper, interleaved_paper_b or lst_paper."""
    map_shards: bool = False
    """Read shards through an uncompressed copy beside each, for corpora larger than memory."""
    recipe: Flat[LMRecipe] = defaults.LM
    """What is trained, and how."""

    @classmethod
    def starting_from(cls, preset: str = "", kind: Kind | None = None, continue_from: str = "") -> "TrainLM":
        """A run that is continued gives kind, sizes and patches, unless `preset` and `kind` name others.

        Raises ValueError naming the known sizes and recipes, or the known kinds.
        """
        known = bool(continue_from) and (Path(continue_from) / RUN).is_file()
        if not known:  # one that is missing is for the training to refuse
            start = cls._sized(preset or "toy", kind or "latent")
            return replace(start, recipe=replace(start.recipe, continue_from=continue_from))
        going_on = made_of(Path(continue_from))
        of_run: Kind = "plain" if isinstance(going_on["model"], PlainLMConfig) else "latent"
        start = cls._sized(preset or "toy", kind or of_run)
        own_sizes = {} if preset or start.kind != of_run else going_on
        return replace(start, recipe=replace(start.recipe, continue_from=continue_from, **own_sizes))

    @classmethod
    def _sized(cls, preset: str, kind: Kind) -> "TrainLM":
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
        given = tokenizers_and_shards(self.tokenizer, self.text_tokenizer, self.data)
        recipe = replace(self.recipe, weights=weights_of(self.mixture, self.recipe.weights, self.data))
        folder = Path(self.run_dir)
        first = distributed.rank() == 0
        if first:
            print(f"mixture  {shares(recipe.weights)}")
        own = given.speech if isinstance(given.speech, SupervisedTokenizer) else None
        with remembered(self, folder, writes=first):
            found = train_lm(
                recipe,
                given.shards,
                given.text,
                folder,
                "lm",
                tokenizer_dir=None if own else Path(self.tokenizer),  # a released one may be gigabytes
                speech_tokenizer=given.speech,
                map_shards=self.map_shards,
            )
        if first:
            if own:
                own.save(folder / TOKENIZER_DIR)
            report(found, folder, f"speechquilt eval {self.run_dir} ITEMS.jsonl")


@dataclass(frozen=True, kw_only=True)
class Given:
    """What every training on shards needs."""

    speech: SpeechTokenizer
    text: TextTokenizer
    shards: dict[str, Path]


def tokenizers_and_shards(tokenizer: str, text_tokenizer: str, data: dict[str, str]) -> Given:
    """Raises ValueError when the settings do not name them, or when shards were made with other tokenizers."""
    if not data:
        raise ValueError("data is empty; name at least one source, for example --data speech=shards/speech")
    speech = loading.load(required("tokenizer", tokenizer))
    text = text_tokenizer_of(speech, text_tokenizer)
    shards = {s: Path(path) for s, path in data.items()}
    check_shards(shards, speech, text)
    return Given(speech=speech, text=text, shards=shards)
