"""The first codebook: a metric finds the directions that the loss feels, and codes are means of their vectors."""

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.nn.quantize import nearest_codes
from speechquilt.stages import train_tokenizer as recipes
from speechquilt.stages.first_codebook import first_codebook, metric, sensitivity
from speechquilt.stages.train_tokenizer import train_tokenizer
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from tests.unit.test_speech_corpora import TEXT, CountingCorpus
from tests.unit.test_tokenizer_recipe import FIRST_RUN, RECIPE, TRAIN, held_out, weights

WEIGHED = replace(FIRST_RUN, model=replace(FIRST_RUN.model, metric_width=4))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), felt=st.integers(0, 7))
def test_the_direction_that_the_loss_feels_comes_first(seed: int, felt: int) -> None:
    """Vectors differ by the same everywhere, or ten times as much where nothing is felt."""
    draw = torch.Generator().manual_seed(seed)
    vectors_ND = torch.randn(500, 8, generator=draw)
    vectors_ND[:, (felt + 1) % 8] *= 10
    sensitivity_DD = torch.zeros(8, 8)
    sensitivity_DD[felt, felt] = 100.0
    map_D = metric(sensitivity_DD, vectors_ND, 1)[:, 0].abs()
    assert map_D.argmax() == felt
    whole_DE = metric(sensitivity_DD, vectors_ND, 8)
    x_D = torch.randn(8, generator=draw)
    change = x_D @ (sensitivity_DD + 0.01 * 12.5 * torch.eye(8)) @ x_D  # the ridge on a mean sensitivity of 12.5
    torch.testing.assert_close((x_D @ whole_DE).square().sum(), change, rtol=1e-3, atol=1e-3)


def test_sensitivity_is_that_of_the_recognition_loss() -> None:
    """Against gradients taken without a hook, through the upper half alone; nothing is felt below a reader that is deaf."""
    recipe = replace(RECIPE, model=replace(RECIPE.model, vq_warmup_updates=0))
    model = recipes.new_model(recipe, TEXT)
    model.quantizer.close()
    loader = recipes.new_loader(recipe, model, CountingCorpus(9))
    state = loader.state_dict()
    found_DD = sensitivity(model, loader)
    loader.load_state_dict(state)
    summed_DD, count = torch.zeros_like(found_DD), 0
    while count < 8000:
        batch = loader.next_batch()
        pooled_BTD, num_tokens_B = model._pooled(batch.wav_BS, batch.num_samples_B)
        pooled_BTD = pooled_BTD.detach().requires_grad_()
        loss = model.decoder.loss(model._upper(pooled_BTD, num_tokens_B), num_tokens_B, batch.text_BL).sum()
        (gradient_BTD,) = torch.autograd.grad(loss, pooled_BTD)
        rows = [gradient_TD[:n] for gradient_TD, n in zip(gradient_BTD, num_tokens_B.tolist())]
        summed_DD += sum(g.T @ g for g in rows)
        count += sum(map(len, rows))
    torch.testing.assert_close(found_DD, summed_DD / count, rtol=1e-3, atol=1e-6)
    for layer in model.decoder.layers:
        torch.nn.init.zeros_(layer.encoder_attn.out_proj.weight)
    assert sensitivity(model, loader).abs().max() == 0


def test_codes_are_means_of_the_vectors_that_the_metric_gives_them(tmp_path: Path) -> None:
    model = recipes.new_model(WEIGHED, TEXT)
    model.quantizer.close()
    loader = recipes.new_loader(WEIGHED, model, CountingCorpus(9))
    made = first_codebook(model, loader, tmp_path, vectors=100, passes=8, seed=0)
    assert made.metric_DE is not None
    assert made.metric_DE.shape == (model.config.width, 4)
    again = first_codebook(model, loader, tmp_path, vectors=100, passes=8, seed=0)
    assert torch.equal(again.codes_KD, made.codes_KD)
    assert torch.equal(again.metric_DE, made.metric_DE)
    ids_K = nearest_codes(made.codes_KD @ made.metric_DE, made.codes_KD @ made.metric_DE)
    assert (ids_K == torch.arange(len(ids_K))).float().mean() > 0.9  # hardly two codes in one place


def test_a_weighed_tokenizer_saves_its_metric_and_is_known_by_it(tmp_path: Path) -> None:
    train_tokenizer(replace(WEIGHED, train=replace(TRAIN, steps=2)), TEXT, CountingCorpus(9), held_out(), tmp_path)
    tokenizer = SupervisedTokenizer.load(tmp_path)
    assert weights(tmp_path)["quantizer.metric_DE"].shape == (tokenizer.config.width, 4)
    before = tokenizer.fingerprint
    tokenizer.quantizer.metric_DE[0, 0] += 1
    assert tokenizer.fingerprint != before
