"""Every shipped run builds, says its settings as the papers do, and is the one that both `train` and `plan` read."""

import pytest
import torch

from speechquilt.cli import COMMANDS
from speechquilt.commands.grammar import parse
from speechquilt.commands.train_decoder import TrainDecoder
from speechquilt.commands.train_lm import TrainLM
from speechquilt.commands.train_text_to_token import TrainTextToToken
from speechquilt.commands.train_tokenizer import TrainTokenizer
from speechquilt.commands.train_vocoder import TrainVocoder
from speechquilt.config import from_dict, to_dict
from speechquilt.model.latent import LatentLM, LatentLMConfig
from speechquilt.model.plain import PlainLM
from speechquilt.recipes import catalog
from speechquilt.stages.cost import decoder_flops
from speechquilt.stages.train_decoder import DecoderRecipe
from speechquilt.stages.train_lm import LMRecipe
from speechquilt.stages.train_text_to_token import TextToTokenRecipe
from speechquilt.stages.train_vocoder import VocoderRecipe
from speechquilt.text_to_token.network import TextToTokenConfig, TextToTokenLM
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.vocab import Vocab

TRAININGS = {
    "lm": TrainLM,
    "tokenizer": TrainTokenizer,
    "text_to_token": TrainTextToToken,
    "vocoder": TrainVocoder,
    "decoder": TrainDecoder,
}
LANGUAGE_MODELS = [name for name, entry in catalog.ENTRIES.items() if entry.kind == "lm"]


@pytest.mark.parametrize("name", catalog.ENTRIES)
def test_train_reads_the_object_that_plan_prices(name: str) -> None:
    command = COMMANDS["train"][name]  # type: ignore[index]
    run = parse(TRAININGS[catalog.ENTRIES[name].kind], command.words)
    assert run.recipe == catalog.load(name).recipe
    assert from_dict(type(run), to_dict(run)) == run  # a run folder's settings.json brings it back


@pytest.mark.parametrize("name", catalog.ENTRIES)
def test_every_recipe_builds(name: str) -> None:
    recipe = catalog.load(name).recipe
    with torch.device("meta"):
        if isinstance(recipe, LMRecipe):
            config = recipe.model.for_vocab(Vocab(num_text=100, num_speech=50))
            model = LatentLM(config) if isinstance(config, LatentLMConfig) else PlainLM(config)
            recipe.patcher.build()
        elif isinstance(recipe, TextToTokenRecipe):
            model = TextToTokenLM(TextToTokenConfig(num_text=100, num_speech=50, llama=recipe.llama))
        elif isinstance(recipe, VocoderRecipe):
            model = recipe.build()
        elif isinstance(recipe, DecoderRecipe):
            model = recipe.flow.build()
        else:
            model = SupervisedTokenizer(recipe.model)
    assert sum(p.numel() for p in model.parameters()) > 1e7


@pytest.mark.parametrize("name", [n for n in LANGUAGE_MODELS if not n.startswith("interleaved")])
def test_the_ladder_has_the_settings_of_the_lst_paper(name: str) -> None:
    """Spec latent-speech-text 7; the 7B takes steps of about 4.0M units at half the rate (choice)."""
    recipe = catalog.load(name).recipe
    train, pack = recipe.train, recipe.pack
    large = name.endswith("_7b")
    assert (train.lr, train.warmup_steps, train.min_lr_ratio) == (2e-4 if large else 4e-4, 2000, 0.01)
    assert (train.schedule, train.beta1, train.beta2, train.weight_decay) == ("cosine", 0.9, 0.95, 0.1)
    assert (train.dtype, train.clip, train.accumulate) == ("bfloat16", 1.0, 1)
    assert pack.rows * pack.units_per_row == pytest.approx(4.0e6 if large else 524_288, rel=0.05)
    assert recipe.weights == pytest.approx({"text": 2 / 3, "parallel": 1 / 3})


@pytest.mark.parametrize(("name", "steps"), [("lst_1_4b", 200_000), ("lst_7b", 25_000), ("lst_420m", 24_033)])
def test_steps_are_the_papers_or_compute_optimal(name: str, steps: int) -> None:
    """The 420M sees 8.4B text and 4.2B interleaved tokens (spec latent-speech-text 8), as many as units of its baseline."""
    assert catalog.load(name).recipe.train.steps == steps


def test_an_lst_and_its_baseline_take_the_same_compute_budget() -> None:
    for size in ("420m", "1_4b", "7b"):
        lst, baseline = (catalog.load(f"{family}_{size}").recipe for family in ("lst", "baseline"))
        assert lst.train == baseline.train
        assert lst.pack.rows * lst.pack.units_per_row == baseline.pack.rows * baseline.pack.units_per_row


@pytest.mark.parametrize(("name", "tokens"), [("interleaved_1_5b", 1e11), ("interleaved_9b", 1e12)])
def test_interleaved_runs_have_the_settings_of_their_paper(name: str, tokens: float) -> None:
    """Spec synthetic-interleaved 6: linear 6e-5 to 6e-6 at 8,192."""
    recipe = catalog.load(name).recipe
    train, pack = recipe.train, recipe.pack
    assert (train.lr, train.schedule, train.min_lr_ratio) == (6e-5, "linear", pytest.approx(0.1))
    assert (pack.units_per_row, pack.tokens_per_row) == (8192, 8192)
    assert train.steps * pack.rows * pack.units_per_row == pytest.approx(tokens, rel=0.01)


def test_the_interleaved_1_5b_has_the_size_of_its_name() -> None:
    run = catalog.load("interleaved_1_5b")
    with torch.device("meta"):
        model = PlainLM(run.recipe.model.for_vocab(Vocab(num_text=run.vocab_size - 16_390, num_speech=16_384)))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.5e9, rel=0.03)


def test_the_vocoder_has_the_settings_of_the_public_configuration() -> None:
    """gemelo-ai/vocos, configs/vocos.yaml: 16 pieces of 16,384 samples, 45 : 1 : 0.1, a million steps; 13.5 million weights."""
    recipe = catalog.load("vocoder_22khz").recipe
    train, gan = recipe.train, recipe.gan
    assert (recipe.crops.samples, recipe.crops.rows, train.steps, gan.after) == (16_384, 16, 1_000_000, 0)
    assert (train.lr, train.beta1, train.beta2) == (5e-4, 0.8, 0.9)
    assert (45 * gan.weight, gan.window_weight) == (pytest.approx(1.0), 0.1)
    with torch.device("meta"):
        assert sum(p.numel() for p in recipe.vocoder.build().parameters()) == pytest.approx(13.5e6, rel=0.01)


def test_the_decoder_has_the_sizes_of_the_release() -> None:
    """Spec 1, 3.1: 111,166,208 weights; FLOPs as weights say, since all of the estimator but its attention is products with them."""
    recipe = catalog.load("decoder_111m").recipe
    with torch.device("meta"):
        model = recipe.flow.build()
    assert sum(p.numel() for p in model.parameters()) == 111_166_208
    per_half_frame = 6 * sum(p.numel() for p in model.unet.parameters())  # most levels see every second frame
    frames = recipe.flow.time.num_frames(recipe.pieces.tokens)
    assert 0.9 < decoder_flops(recipe) / (per_half_frame * frames / 2) < 1.6


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean lst_1_4b"):
        catalog.load("lst_1_4")
