"""`train_lm` as a user runs it: under torchrun with sharded weights, and from a pretrained text model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speechquilt import config
from speechquilt.data.feed.pack import PackConfig
from speechquilt.evals.scorer import Request
from speechquilt.model import ladder, saving
from speechquilt.model.entropy import EntropyConfig
from speechquilt.model.latent import LatentLM
from speechquilt.model.patcher import PatcherConfig
from speechquilt.stages.train_entropy import MADE, EntropyRecipe, train_entropy
from speechquilt.stages.train_lm import LMRecipe, load_scorer, train_lm
from speechquilt.train.trainer import TrainConfig
from tests.parity.tiny_checkpoints import saved
from tests.unit.test_budget import LATENT, PLAIN, TOKENIZER, WEIGHTS, shards, text  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
RECIPE = LMRecipe(
    model=LATENT,
    patcher=PatcherConfig(kind="curriculum", patch_size=4),
    weights=WEIGHTS,
    pack=PackConfig(rows=4, units_per_row=96, tokens_per_row=256),
    train=TrainConfig(steps=6, lr=1e-2, log_every=2, checkpoint_every=4, device="cpu", num_threads=1),
)


def rank_main(recipe_path: str, shards_json: str, folder: str) -> None:
    """What one rank does: the recipe from its JSON, as any launcher would."""
    recipe = config.load(LMRecipe, Path(recipe_path))
    train_lm(recipe, {k: Path(v) for k, v in json.loads(shards_json).items()}, TOKENIZER, Path(folder), "lm")


def test_two_sharded_ranks_leave_the_folder_that_one_process_leaves(shards, tmp_path):  # noqa: F811
    alone, together = tmp_path / "alone", tmp_path / "together"
    train_lm(RECIPE, shards, TOKENIZER, alone, "lm")
    together.mkdir()
    config.save(replace(RECIPE, train=replace(RECIPE.train, shard="full")), tmp_path / "recipe.json")
    paths = json.dumps({name: str(path) for name, path in shards.items()})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "tests.e2e.test_train_lm", str(tmp_path / "recipe.json"), paths, str(together)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (saving.load(folder).state_dict() for folder in (alone, together))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-3)
    scorer, run = load_scorer(together)
    assert run == load_scorer(alone)[1]
    assert scorer.log_likelihoods([Request((), text("balon kemit"))])[0].sum < 0


def test_a_latent_model_starts_from_a_text_model_and_learns(shards, tmp_path):  # noqa: F811
    base, _ = saved(tmp_path / "base", "llama", vocab_size=TOKENIZER.size, bos_token_id=None, eos_token_id=None)
    TOKENIZER.save(base / "tokenizer.json")
    recipe = replace(RECIPE, model=replace(LATENT, text_path="bypass"), warm_start=str(base))
    found = train_lm(recipe, shards, TOKENIZER, tmp_path / "run", "lm")
    assert found["lm.lm.steps"] == 6
    model = saving.load(tmp_path / "run")
    assert isinstance(model, LatentLM)
    assert model.config.global_.width == 32  # the base's, not the recipe's


def test_a_base_without_the_bypass_is_refused():
    with pytest.raises(ValueError, match="text_path=bypass"):
        replace(RECIPE, warm_start="base")
    replace(RECIPE, model=PLAIN, patcher=PatcherConfig(kind="none"), warm_start="base")


def test_an_entropy_model_is_trained_calibrated_and_used(shards, tmp_path):  # noqa: F811
    recipe = EntropyRecipe(
        model=ladder.plain("toy"),
        patch_size=2.5,
        max_patch_size=8,
        pack=RECIPE.pack,
        train=replace(RECIPE.train, steps=30),
    )
    spoken = {name: path for name, path in shards.items() if name != "text"}
    train_entropy(recipe, spoken, TOKENIZER, tmp_path / "entropy")
    patching = config.load(EntropyConfig, tmp_path / "entropy" / MADE)
    recipe = replace(RECIPE, patcher=PatcherConfig(kind="entropy", entropy=patching))
    found = train_lm(recipe, shards, TOKENIZER, tmp_path / "run", "lm")
    assert found["lm.lm.patch_size"] == pytest.approx(2.5, rel=0.15)  # on other documents than it was calibrated on
    scorer, _ = load_scorer(tmp_path / "run")  # entropy patches are causal: the model can speak
    assert len(scorer.generate([(text("balon"),)], "speech", 12)[0]) <= 12


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
