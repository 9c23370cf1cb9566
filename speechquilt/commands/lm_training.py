"""`speechquilt train lm`: one speech-text language model on folders of shards.

Place in the pipeline: layer 4, the settings over `lm` (the training) and `mixtures`. Also under torchrun; docs/how-to/many-gpus.md.
Trap: the name of a source says what is in its folder; weights, mixtures and bounds go by it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from speechquilt.data.feed.pack import PackConfig
from speechquilt.data.feed.spoken_documents import JoinConfig
from speechquilt.files import make_folder
from speechquilt.model import ladder
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.recipes import defaults
from speechquilt.recipes.mixtures import shares, weights_of
from speechquilt.stages.budget import Budget
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import report, required
from speechquilt.stages.train_lm import LMRecipe, train_lm
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import distributed
from speechquilt.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class LMTraining:
    """`shards`: source name -> folder, for example '{"speech": "shards/speech", "text": "shards/text"}'; `weights`: share of
    tokens per source (default: the story's, for the sources given), or `mixture`: a preset of `mixtures` instead of them;
    `max_epochs`: source name -> how often it may be gone through; `join_seconds` above 0 makes one document of neighbouring
    recordings whose ids agree on the first group of `join_session`, up to that length (docs/how-to/mixtures.md);
    `tokenizer`: run folder of the speech tokenizer; `map_shards` reads shards through an uncompressed copy beside each, for
    corpora larger than memory.

    `budget` "units" or "tokens" trains for `budget_amount` of them instead of `train.steps`; `speech_pieces` reads speech as
    that many BPE pieces. `preset` is a size of docs/presets.md, `text_path` the way of text in a latent model ("decoder" or
    "bypass"), `warm_start` a Hugging Face folder to start from. On many GPUs: docs/how-to/many-gpus.md.
    """

    shards: dict[str, str] = field(default_factory=dict)
    map_shards: bool = False
    tokenizer: str = "runs/tokenizer"
    run_dir: str = "runs/lm"
    kind: Literal["plain", "latent"] = "latent"
    preset: str = "toy"
    text_path: Literal["decoder", "bypass"] = "decoder"
    warm_start: str = ""
    patcher: PatcherConfig = PatcherConfig(kind="static", patch_size=defaults.PATCH_SIZE)
    weights: dict[str, float] = field(default_factory=lambda: dict(defaults.WEIGHTS))
    mixture: str = ""
    max_epochs: dict[str, float] = field(default_factory=dict)
    join_seconds: float = 0.0
    join_session: str = JoinConfig().session
    pack: PackConfig = defaults.PACK
    train: TrainConfig = defaults.PRETRAIN
    budget: Budget = "steps"
    budget_amount: int = 0
    speech_pieces: int | None = None


def run_lm(settings: LMTraining) -> None:
    """`speechquilt train lm`; resumes by itself. Prints the mixture and what was measured."""
    try:
        tokenizer, shards = tokenizer_and_shards(settings.tokenizer, settings.shards)
        recipe = recipe_of(settings, tokenizer.frame_rate)
        if distributed.rank() == 0:
            print(f"mixture  {shares(recipe.weights)}")
        folder = Path(settings.run_dir)
        make_folder(folder)
        text_tokenizer = text_tokenizer_of(tokenizer)
        found = train_lm(recipe, shards, text_tokenizer, folder, "lm", map_shards=settings.map_shards)
        if distributed.rank() == 0:
            tokenizer.save(folder / "tokenizer")
            report(found, folder, f"speechquilt eval {settings.run_dir} ITEMS.jsonl")
    finally:
        distributed.stop()


def recipe_of(settings: LMTraining, frame_rate: float) -> LMRecipe:
    """The training that the settings ask for, at the tokenizer's tokens per second. Raises ValueError as `LMRecipe` does."""
    return LMRecipe(
        model=model_of(settings.kind, settings.preset, settings.text_path),
        warm_start=settings.warm_start,
        patcher=settings.patcher,
        weights=weights_of(settings.mixture, settings.weights, settings.shards),
        max_epochs=settings.max_epochs,
        join=JoinConfig(max_tokens=round(settings.join_seconds * frame_rate), session=settings.join_session),
        pack=settings.pack,
        train=settings.train,
        budget=settings.budget,
        budget_amount=settings.budget_amount,
        speech_pieces=settings.speech_pieces,
    )


def model_of(
    kind: str, preset: str = "toy", text_path: Literal["decoder", "bypass"] = "decoder"
) -> PlainLMConfig | LatentLMConfig:
    """The sizes of a preset; the vocabulary comes with the shards."""
    return ladder.plain(preset) if kind == "plain" else replace(ladder.latent(preset), text_path=text_path)


def tokenizer_and_shards(tokenizer: str, shards: dict[str, str]) -> tuple[SupervisedTokenizer, dict[str, Path]]:
    """What every training on shards needs. Raises ValueError when the settings do not name it."""
    if not shards:
        raise ValueError('shards is empty; name at least one, for example shards=\'{"speech": "shards/speech"}\'')
    return SupervisedTokenizer.load(required("tokenizer", tokenizer)), {s: Path(path) for s, path in shards.items()}
