"""`speechquilt train entropy`: the small speech LM behind entropy patching, and the threshold for a wanted patch size.

Place in the pipeline: layer 4, after the shards and before `train lm` with `patcher.kind=entropy` (BLT's patching, an
alternative that needs no word times).
Trap: the model reads the ids of one vocabulary. Train it on the shards, and with the text tokenizer, of the run that uses it.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from speechquilt import config
from speechquilt.commands.lm_training import tokenizer_and_shards
from speechquilt.data.feed.pack import PackConfig
from speechquilt.files import make_folder
from speechquilt.model import ladder, saving
from speechquilt.model.entropy import EntropyConfig, calibrate
from speechquilt.model.patcher import PatcherConfig
from speechquilt.model.plain import PlainLM
from speechquilt.recipes import defaults
from speechquilt.stages.encode import text_tokenizer_of
from speechquilt.stages.stage import report
from speechquilt.stages.train_lm import LMData, LMRecipe, open_data, train_lm
from speechquilt.text import TextTokenizer
from speechquilt.train import distributed
from speechquilt.train.trainer import TrainConfig
from speechquilt.types import LaidOut

SAMPLE = 200  # documents that the threshold is read from
SETTINGS = "entropy.json"


@dataclass(frozen=True, kw_only=True)
class EntropyRun:
    """`shards`: sources with speech, name -> folder; `tokenizer`: run folder of the speech tokenizer. `patch_size`: mean speech
    tokens per patch to aim at; no patch grows past `max_patch_size`."""

    shards: dict[str, str] = field(default_factory=dict)
    tokenizer: str = "runs/tokenizer"
    run_dir: str = "runs/entropy"
    preset: str = "toy"
    patch_size: float = float(defaults.PATCH_SIZE)
    max_patch_size: int = 4 * defaults.PATCH_SIZE
    pack: PackConfig = defaults.PACK
    train: TrainConfig = field(default_factory=lambda: replace(defaults.PRETRAIN, steps=300, warmup_steps=30))


def train_entropy(
    settings: EntropyRun, shards: dict[str, Path], text_tokenizer: TextTokenizer, folder: Path
) -> dict[str, Any]:
    """Train the LM on all sources alike, read the threshold off a sample, write both to `folder`."""
    recipe = LMRecipe(
        model=ladder.plain(settings.preset),
        patcher=PatcherConfig(kind="none"),
        weights=dict.fromkeys(shards, 1.0),
        pack=settings.pack,
        train=settings.train,
    )
    found = train_lm(recipe, shards, text_tokenizer, folder, "entropy")
    if distributed.rank() != 0:
        return found
    model = saving.load(folder)
    assert isinstance(model, PlainLM)
    data = open_data(recipe, shards, text_tokenizer, folder)
    threshold = calibrate(
        model, sample(data, recipe), patch_size=settings.patch_size, max_patch_size=settings.max_patch_size
    )
    patching = EntropyConfig(model=str(folder), threshold=threshold, max_patch_size=settings.max_patch_size)
    config.save(patching, folder / SETTINGS)
    return {**found, "entropy.threshold": threshold}


def sample(data: LMData, recipe: LMRecipe) -> list[LaidOut]:
    """Documents spread evenly over every source, as the patcher will see them."""
    documents = []
    for source in data.sources.values():
        places = np.linspace(0, len(source) - 1, min(SAMPLE // len(data.sources) + 1, len(source)), dtype=int)
        documents += [source[i] for i in places.tolist()]
    return [data.run.vocab.lay_out(document) for document in documents]


def run(settings: EntropyRun) -> None:
    """`speechquilt train entropy`."""
    tokenizer, shards = tokenizer_and_shards(settings.tokenizer, settings.shards)
    folder = Path(settings.run_dir)
    make_folder(folder)
    found = train_entropy(settings, shards, text_tokenizer_of(tokenizer), folder)
    if distributed.rank() == 0:
        made = (folder / SETTINGS).read_text().replace("\n", "")
        report(found, folder, f"speechquilt train lm ... patcher.kind=entropy 'patcher.entropy={made}'")
