"""Stage 5: pre-train one speech-text language model on a mixture of shards.

Place in the pipeline: layer 4, after the shards. Models are compared at equal global units: every run has the same rows of
the same number of units and the same steps, so a patched model reads more tokens.
Trap: a run folder remembers its patcher and vocabulary in `run.json`; a model without them cannot be used.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechquilt import config
from speechquilt.data.mixture import MixtureConfig
from speechquilt.data.pack import PackConfig
from speechquilt.data.shards import ShardFolder
from speechquilt.evals.scorer import Scorer
from speechquilt.model import folder as model_folder
from speechquilt.model.flops import training_flops
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.lm import PlainLMConfig
from speechquilt.model.patcher import PatcherConfig, eval_patcher
from speechquilt.text import TextTokenizer
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import Batch
from speechquilt.vocab import Vocab


@dataclass(frozen=True, kw_only=True)
class LMRecipe:
    """`model.vocab_size` is filled in from the shards. `weights`: share of tokens per source, missing sources left out."""

    model: PlainLMConfig | LatentLMConfig
    patcher: PatcherConfig
    weights: dict[str, float]
    pack: PackConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class LMRun:
    """`run.json`: what is needed to use a trained model beside its weights."""

    num_text: int
    num_speech: int
    text_fingerprint: str
    speech_fingerprint: str
    patcher: PatcherConfig

    @property
    def vocab(self) -> Vocab:
        return Vocab(num_text=self.num_text, num_speech=self.num_speech)


def train_lm(
    recipe: LMRecipe, shards: dict[str, Path], text_tokenizer: TextTokenizer, folder: Path, name: str
) -> dict[str, Any]:
    """Train on the sources of `shards` that have a weight; save to `folder`; return flat results (`lm.<name>.*`).

    Raises ValueError when the shards were made with different tokenizers.
    """
    sources = {s: ShardFolder(path) for s, path in shards.items() if recipe.weights.get(s)}
    run = _run_of(sources, recipe.patcher)
    vocab = run.vocab
    model_config = recipe.model.for_vocab(vocab)
    model = model_config.build(recipe.train.seed)
    weights = {s: recipe.weights[s] for s in sources}
    loader = recipe.pack.build(
        MixtureConfig(weights=weights, seed=recipe.train.seed).build(sources),
        vocab,
        recipe.patcher.build(),
        seed=recipe.train.seed,
        total_batches=recipe.train.steps * recipe.train.accumulate,
    )

    def flops(batch: Batch) -> float:
        return training_flops(model_config, batch)

    done = Trainer(recipe.train, model, NextTokenObjective(vocab, flops), loader, folder, name=name).train()
    model_folder.save(model.eval().to("cpu"), folder)
    text_tokenizer.save(folder / "text_tokenizer.json")
    config.save(run, folder / "run.json")
    totals = {key.removeprefix("total_"): value for key, value in done.totals.items()}
    text_tokens = totals["tokens"] - totals["speech_tokens"]
    return {
        f"lm.{name}.{key}": value
        for key, value in {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": done.steps,
            "units": int(totals["units"]),
            "tokens": int(totals["tokens"]),
            "speech_tokens": int(totals["speech_tokens"]),
            "text_tokens": int(text_tokens),
            "flops": totals["flops"],
            "seconds": done.seconds,
            "patch_size": totals["speech_tokens"] / max(1.0, totals["speech_units"]),
            "text_patch_size": text_tokens / max(1.0, totals["units"] - totals["speech_units"]),
        }.items()
    }


def load_scorer(folder: Path) -> tuple[Scorer, LMRun]:
    """A trained model ready to be asked, patched as models are tested."""
    run = config.load(LMRun, folder / "run.json")
    return Scorer(model_folder.load(folder).eval(), run.vocab, eval_patcher(run.patcher)), run


def _run_of(sources: dict[str, ShardFolder], patcher: PatcherConfig) -> LMRun:
    """The vocabulary all sources agree on."""
    if not sources:
        raise ValueError("no source has both shards and a weight; name at least one in both")
    infos = {name: shards.info for name, shards in sources.items()}
    values = {}
    for key in ("num_text", "num_speech", "text_fingerprint", "speech_fingerprint"):
        found = {name: getattr(info, key) for name, info in infos.items() if getattr(info, key)}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"the shards disagree on {key}: {found}; make them all with the same tokenizers before training"
            )
        values[key] = next(iter(found.values()))
    return LMRun(**values, patcher=patcher)
