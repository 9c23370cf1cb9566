"""Speech rows that are maps of the codebook: what they share, what folding keeps, and that a few steps learn more."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from speechquilt.model import saving
from speechquilt.model.latent import LatentLMConfig
from speechquilt.model.plain import PlainLMConfig
from speechquilt.nn.llama import LlamaConfig
from speechquilt.recipes import defaults
from speechquilt.stages.train_lm import speech_rows
from speechquilt.text_to_token import codebook_rows
from speechquilt.text_to_token.network import TextToTokenConfig, TextToTokenLM
from speechquilt.train.objectives.next_token import NextTokenObjective
from speechquilt.train.trainer import TrainConfig, Trainer
from speechquilt.types import IGNORE, Batch
from speechquilt.vocab import Vocab

NUM_SPEECH = 40
LLAMA = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)
CONFIG = TextToTokenConfig(num_text=20, num_speech=NUM_SPEECH, llama=LLAMA)
VOCAB = CONFIG.vocab
SPEECH = slice(VOCAB.speech_start, VOCAB.speech_start + NUM_SPEECH)


def codebook(seed: int = 0) -> torch.Tensor:
    return 3 + 5 * torch.randn(NUM_SPEECH, 6, generator=torch.Generator().manual_seed(seed))


def attached() -> TextToTokenLM:
    model = CONFIG.build()
    codebook_rows.attach(model, codebook())
    return model


def batch(ids: list[list[int]]) -> Batch:
    ids_BT = torch.tensor(ids)
    labels_BT = torch.cat([ids_BT[:, 1:], torch.full((len(ids), 1), IGNORE)], 1)
    return Batch(ids_BT=ids_BT, labels_BT=labels_BT, doc_BT=torch.zeros_like(ids_BT), meta={})


def test_only_speech_rows_change_and_they_have_the_usual_spread():
    plain, model = CONFIG.build(), attached()
    for old, new, std in (
        (plain.model.embed_tokens.weight, model.model.embed_tokens.weight, 1.0),
        (plain.lm_head.weight, model.lm_head.weight, LLAMA.width**-0.5),
    ):
        assert torch.equal(old[: SPEECH.start], new[: SPEECH.start])
        assert torch.equal(old[SPEECH.stop :], new[SPEECH.stop :])
        assert new[SPEECH].detach().square().mean().sqrt().item() == pytest.approx(std, rel=0.4)


def test_near_codes_have_near_rows():
    codes_KC = codebook()
    codes_KC[1] = codes_KC[0] + 0.01
    model = CONFIG.build()
    codebook_rows.attach(model, codes_KC)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        rows_KD = weight[SPEECH]
        apart = (rows_KD[0] - rows_KD).norm(dim=1)
        assert apart[1] < 0.05 * apart[2:].min()


def test_a_code_can_still_differ_from_its_neighbours():
    model = attached()
    before = model.lm_head.weight.detach()
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original[SPEECH.start + 3] += 1
    moved_V = (model.lm_head.weight.detach() - before).abs().sum(1)
    assert moved_V.nonzero()[:, 0].tolist() == [SPEECH.start + 3]


def test_folding_keeps_what_the_model_computes_and_leaves_a_plain_llama():
    model, data = attached(), batch([[1, 2, SPEECH.start, SPEECH.start + 7, SPEECH.stop - 1]])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    before = model(data)
    codebook_rows.fold(model)
    assert torch.equal(model(data), before)
    assert model.state_dict().keys() == CONFIG.build().state_dict().keys()
    codebook_rows.fold(model)  # again, or where nothing was attached: nothing happens
    assert torch.equal(model(data), before)


def test_one_token_teaches_its_neighbours():
    """After a step on one code the row of a near code has moved too, in embedding and head; without maps it has not."""
    codes_KC = codebook()
    codes_KC[1] = codes_KC[0] + 0.01
    for maps in (True, False):
        model = CONFIG.build()
        if maps:
            codebook_rows.attach(model, codes_KC)
        before = model.model.embed_tokens.weight[SPEECH.start + 1].clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        F.cross_entropy(model(batch([[1, SPEECH.start, 2]]))[0, 1:2], torch.tensor([2])).backward()
        optimizer.step()
        assert torch.equal(model.model.embed_tokens.weight[SPEECH.start + 1], before) != maps


def test_a_head_can_prefer_codes_near_a_point():
    """The squared length is among the features: logits that fall with the squared distance to a point are in reach."""
    codes_KC = codebook(1)
    features_KF = codebook_rows.features(codes_KC)
    wanted_K = -(codes_KC - codes_KC[5] - 0.3).square().sum(1)
    design_KF = torch.cat([features_KF, torch.ones(NUM_SPEECH, 1)], 1).double()
    found_K = design_KF @ torch.linalg.lstsq(design_KF, wanted_K[:, None].double()).solution
    torch.testing.assert_close(found_K[:, 0].float(), wanted_K, rtol=1e-3, atol=1e-2)


class TwoTokens:
    """A loader without a state: the same batch for ever."""

    def next_batch(self) -> Batch:
        data = batch([[1, 2, SPEECH.start, SPEECH.start + 7, SPEECH.stop - 1]])
        return replace(data, meta={"tokens": 5, "speech_tokens": 3, "units": 5, "speech_units": 3})

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_a_run_that_is_broken_off_ends_the_same(tmp_path):
    found = []
    for name, stops in (("whole", [None]), ("broken", [2, None])):
        for stop in stops:
            model = attached()
            config = TrainConfig(steps=4, lr=0.1, checkpoint_every=2, device="cpu", num_threads=1)
            objective = NextTokenObjective(VOCAB, labelled_only=True)
            Trainer(config, model, objective, TwoTokens(), tmp_path / name).train(stop_after=stop)
        codebook_rows.fold(model)
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    fresh = attached()
    codebook_rows.fold(fresh)
    assert not torch.equal(found[0]["lm_head.weight"], fresh.lm_head.weight)


def test_the_codebook_is_not_stored_with_a_run():
    assert not any("features" in name for name in attached().state_dict())


def test_a_codebook_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="41 codes and the model 40 speech ids"):
        codebook_rows.attach(CONFIG.build(), torch.randn(41, 6))
    with pytest.raises(ValueError, match="all codes of the codebook are the same"):
        codebook_rows.attach(CONFIG.build(), torch.ones(40, 6))


# --- language models, whose rows may come from a base


LM_VOCAB = Vocab(num_text=30, num_speech=NUM_SPEECH)
LATENT = LatentLMConfig(
    vocab_size=0, global_=LLAMA, local_width=8, encoder_layers=1, decoder_layers=1, local_heads=2, local_ffn=8
)
LANGUAGE_MODELS = {
    "plain": PlainLMConfig(vocab_size=0, llama=LLAMA),
    "latent": LATENT,
    "latent, text past the local modules": replace(LATENT, text_path="bypass"),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_rows_of_a_language_model_keep_mean_and_spread_and_all_others_stay(name: str) -> None:
    before = LANGUAGE_MODELS[name].for_vocab(LM_VOCAB).build(1)
    with torch.no_grad():
        before.embedding.weight += 2.0  # as the mean of a base's rows
    model = copy.deepcopy(before)
    tables, first = speech_rows(model, LM_VOCAB)
    codebook_rows.attach_to(tables, first, codebook())
    for old, new in zip(speech_rows(before, LM_VOCAB)[0], tables):
        ours = slice(first, first + NUM_SPEECH)
        assert torch.equal(old.weight[:first], new.weight[:first])
        assert torch.equal(old.weight[ours.stop :], new.weight[ours.stop :])
        assert not torch.equal(old.weight[ours], new.weight[ours])
        assert new.weight[ours].mean().item() == pytest.approx(old.weight[ours].mean().item(), abs=0.1)
        assert new.weight[ours].std().item() == pytest.approx(old.weight[ours].std().item(), rel=0.4)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_folded_language_model_computes_the_same_and_is_saved_as_ever(name: str, tmp_path: Path) -> None:
    model = LANGUAGE_MODELS[name].for_vocab(LM_VOCAB).build(1).eval()
    names = model.state_dict().keys()
    tables, first = speech_rows(model, LM_VOCAB)
    codebook_rows.attach_to(tables, first, codebook())
    speech, text = LM_VOCAB.speech_start, LM_VOCAB.marker("text")
    data = batch([[LM_VOCAB.bos, 3, LM_VOCAB.marker("speech"), speech, speech + 7, speech + NUM_SPEECH - 1, text, 5]])
    ones_BT = torch.ones_like(data.ids_BT, dtype=torch.bool)
    data = replace(data, opens_BT=ones_BT, closes_BT=ones_BT)
    with torch.no_grad():
        logits_BTV = model(data)
        codebook_rows.fold_into(tables)
        assert torch.allclose(model(data), logits_BTV, atol=1e-5)
    assert model.state_dict().keys() == names
    saving.save(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(saving.load(tmp_path).eval()(data), logits_BTV, atol=1e-5)


def test_a_codebook_larger_than_the_table_is_refused() -> None:
    model = LANGUAGE_MODELS["plain"].for_vocab(LM_VOCAB).build(1)
    with pytest.raises(ValueError, match="has 200 codes and the model"):
        codebook_rows.attach_to(*speech_rows(model, LM_VOCAB), torch.randn(200, 6))


def test_pieces_and_sharded_tables_have_no_codebook_rows() -> None:
    with pytest.raises(ValueError, match="codebook_rows=true with speech_pieces=50"):
        replace(defaults.LM, codebook_rows=True, speech_pieces=50)
    with pytest.raises(ValueError, match=r"train\.shard='full'"):
        replace(defaults.LM, codebook_rows=True, train=replace(defaults.LM.train, shard="full"))
