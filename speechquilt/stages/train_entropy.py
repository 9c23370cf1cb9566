"""The small speech LM behind entropy patching, and the threshold for a wanted patch size (BLT's patching, an alternative that
needs no word times).

Trap: the model reads the ids of one vocabulary. Train it on the shards, and with the text tokenizer, of the run that uses it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt.config import save
from speechquilt.data.feed.pack import PackConfig
from speechquilt.model import saving
from speechquilt.model.entropy import EntropyConfig, calibrate
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLM, PlainLMConfig
from speechquilt.stages.train_lm import LMData, LMRecipe, open_data, train_lm
from speechquilt.text import TextTokenizer
from speechquilt.train import distributed
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import LaidOut

SAMPLE = 200  # documents that the threshold is read from
MADE = "entropy.json"


@dataclass(frozen=True, kw_only=True)
class EntropyRecipe:
    """The model is trained on all sources alike; then the threshold is read off a sample of their documents."""

    model: PlainLMConfig
    """Sizes; the vocabulary comes with the shards."""
    pack: PackConfig
    """How documents fill rows."""
    train: TrainConfig
    """The run."""
    patch_size: float
    """Mean speech tokens per patch to aim at."""
    max_patch_size: int
    """No patch grows past so many speech tokens."""


def train_entropy(
    recipe: EntropyRecipe, shards: dict[str, Path], text_tokenizer: TextTokenizer, folder: Path
) -> dict[str, Any]:
    """Train the LM on all sources alike, read the threshold off a sample, write both to `folder`."""
    lm = LMRecipe(
        model=recipe.model,
        patcher=PatcherConfig(kind="none"),
        weights=dict.fromkeys(shards, 1.0),
        pack=recipe.pack,
        train=recipe.train,
    )
    found = train_lm(lm, shards, text_tokenizer, folder, "entropy")
    if distributed.rank() != 0:
        return found
    model = saving.load(folder)
    assert isinstance(model, PlainLM)
    data = open_data(lm, shards, text_tokenizer, folder)
    threshold = calibrate(model, sample(data, lm), patch_size=recipe.patch_size, max_patch_size=recipe.max_patch_size)
    patching = EntropyConfig(model=str(folder), threshold=threshold, max_patch_size=recipe.max_patch_size)
    save(patching, folder / MADE)
    return {**found, "entropy.threshold": threshold}


def sample(data: LMData, recipe: LMRecipe) -> list[LaidOut]:
    """Documents spread evenly over every source, as the patcher will see them."""
    documents = []
    for source in data.sources.values():
        places = np.linspace(0, len(source) - 1, min(SAMPLE // len(data.sources) + 1, len(source)), dtype=int)
        documents += [source[i] for i in places.tolist()]
    return [data.run.vocab.lay_out(document) for document in documents]
