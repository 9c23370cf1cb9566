"""What keeps a codebook alive inside a Whisper that already hears words: one tokenizer per way of training it.

Every condition differs from the first in one thing. Each finished one is a row of `results.json` at once, so the study may be
interrupted anywhere.
Cost: the steps of both runs for each condition, one after the other; see `steps`. Result:
docs/decisions/0021-codebook.md.
Trap: these are short runs of one seed. They show what collapses and what lives, not which of two living ones is better.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechquilt import audio
from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.evals.wer import wer
from speechquilt.files import write_json
from speechquilt.recipes.real import sizes
from speechquilt.recipes.real.real_evals import recordings
from speechquilt.stages.encode import encode_all
from speechquilt.stages.spoken_corpus import HELD_OUT, TRAIN, UNSEEN_VOICE
from speechquilt.stages.stage import Story, remembered, required
from speechquilt.stages.train_tokenizer import TokenizerRecipe, train_tokenizer
from speechquilt.text import spoken_form
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.tokenizer.whisper_sizes import RATES
from speechquilt.train.metrics import read_metrics
from speechquilt.types import Utterance


def at_rate(recipe: TokenizerRecipe, frame_rate: float) -> TokenizerRecipe:
    """The same codebook at another frame rate."""
    return replace(recipe, model=replace(recipe.model, pooling=RATES[frame_rate].pooling))


def without_first(recipe: TokenizerRecipe) -> TokenizerRecipe:
    """All steps in one run, which collects the vectors of its k-means in its first tenth."""
    assert recipe.first
    steps = recipe.first.steps + recipe.train.steps
    model = replace(recipe.model, vq_warmup_updates=max(1, steps // 10))
    return replace(recipe, first=None, model=model, train=replace(recipe.train, steps=steps))


CONDITIONS: dict[str, Callable[[TokenizerRecipe], TokenizerRecipe]] = {
    "default": lambda recipe: recipe,
    "12.5 Hz": lambda recipe: at_rate(recipe, 12.5),
    "one rate for all": lambda recipe: replace(recipe, lower_lr=1.0),
    "no run before": without_first,
    "4,096 codes": lambda recipe: replace(recipe, model=replace(recipe.model, codebook_size=4096)),
    "a rate of 1e-4": lambda recipe: replace(recipe, train=replace(recipe.train, lr=1e-4)),
    "commitment 2.5": lambda recipe: replace(recipe, model=replace(recipe.model, commitment_weight=2.5)),
    "plain distances": lambda recipe: replace(recipe, model=replace(recipe.model, metric_width=0)),
    "positions as in the paper": lambda recipe: replace(recipe, positions="twice"),
}


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """Ways to put a codebook into Whisper, everything else the same."""

    run_dir: str = "runs/codebook"
    """Folder that holds the study."""
    corpus: str = "runs/real/corpus"
    """Spoken corpus of the real story."""
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    """Which ways to compare."""
    first_steps: int = 100
    """Steps without a codebook."""
    steps: int = 200
    """Steps with it."""
    sentences: int = 100
    """Held-out sentences that are measured, in seen voices and in one that is not."""
    tokenizer: TokenizerRecipe = sizes.TOKENIZER
    """The training that the conditions change."""

    def __post_init__(self) -> None:
        for name in self.conditions:
            if name not in CONDITIONS:
                raise ValueError(f"conditions: {name!r} must be one of {', '.join(map(repr, CONDITIONS))}")
        if not self.tokenizer.first:
            raise ValueError("tokenizer.first must be a run, which the condition 'no run before' leaves out")

    def recipe(self, condition: str) -> TokenizerRecipe:
        """One condition, as short as the study wants it."""
        assert self.tokenizer.first
        first = replace(self.tokenizer.first, steps=self.first_steps, warmup_steps=self.first_steps // 10)
        train = replace(self.tokenizer.train, steps=self.steps, warmup_steps=self.steps // 10)
        return CONDITIONS[condition](replace(self.tokenizer, first=first, train=train))

    def run(self) -> None:
        with remembered(self, Path(self.run_dir)):
            study(self)


def study(config: CodebookConfig) -> Path:
    """Train what is missing; every finished condition is written to results.json, whose path comes back."""
    corpus = Path(required("corpus", config.corpus))
    train = sizes.ROWS.build(FolderCorpus(corpus / TRAIN))
    measured = {name: recordings(corpus / name)[: config.sentences] for name in (HELD_OUT, UNSEEN_VOICE)}
    results = Path(config.run_dir) / "results.json"
    rows = json.loads(results.read_text()) if results.is_file() else {}
    for condition in config.conditions:
        stages = Story(Path(config.run_dir) / condition.replace(" ", "_").replace(",", ""))
        recipe = config.recipe(condition)

        def make(folder: Path, recipe: TokenizerRecipe = recipe) -> dict[str, Any]:
            found = train_tokenizer(recipe, None, train, measured[HELD_OUT], folder)
            return {**found, **_measured(folder, measured)}

        stages.stage("tokenizer", [str(corpus), recipe, config.sentences], make, what=condition)
        rows[condition] = {k: v for k, v in stages.results.items() if k.startswith(("tokenizer.", "codebook."))}
        write_json(results, rows)
    return results


def _measured(folder: Path, groups: dict[str, list[Utterance]]) -> dict[str, Any]:
    """WER of the tokens by group, and how the use of codes went."""
    model = SupervisedTokenizer.load(folder)
    found: dict[str, Any] = {}
    for name, utterances in groups.items():
        ids = encode_all(model, [audio.resample(u.audio, model.sample_rate) for u in utterances])
        read = [spoken_form(text) for text in model.read_back(ids)]
        found[f"codebook.{name}.wer"] = wer(zip([spoken_form(u.text) for u in utterances], read)).rate
    lines = [line for line in read_metrics(folder) if line.get("codes")]
    return found | {
        "codebook.codes_in_a_batch.first": lines[0]["codes"],
        "codebook.codes_in_a_batch.last": lines[-1]["codes"],
        "codebook.loss.last": lines[-1]["attention"],
        "codebook.warnings": [line["warning"] for line in lines if "warning" in line],
    }
