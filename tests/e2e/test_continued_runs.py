"""A run goes on from another run's weights, and documents are held out of training and measured on the way."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speechquilt import config
from speechquilt.commands.train_lm import TrainLM
from speechquilt.data.feed.splits import place, split
from speechquilt.evals.scorer import Scorer
from speechquilt.model import saving
from speechquilt.stages.held_out import read_held_out
from speechquilt.stages.lm_start import BPE_FILE
from speechquilt.stages.train_lm import LMRun, load_scorer, open_data, train_lm
from speechquilt.train import checkpoint
from speechquilt.train.metrics import TIMING, read_metrics
from speechquilt.train.trainer import Trainer
from tests.dummies import random_document
from tests.unit.test_budget import LATENT, PLAIN, TOKENIZER, recipe, shards  # noqa: F401 (a fixture)


def weights(folder) -> dict[str, torch.Tensor]:
    return saving.load(folder).state_dict()


def metrics(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def before(shards, tmp_path_factory):  # noqa: F811
    """A latent run of three steps, that read pieces and began without the opening marker."""
    folder = tmp_path_factory.mktemp("before")
    settings = recipe("static", speech_pieces=40, opening_marker="off")
    train_lm(settings, shards, TOKENIZER, folder, "lm")
    return folder


def test_a_latent_run_goes_on_with_other_data_and_a_schedule_of_its_own(before, shards, tmp_path):  # noqa: F811
    settings = recipe("static", speech_pieces=40, continue_from=str(before), weights={"text": 1.0, "speech": 2.0})
    settings = replace(settings, train=replace(settings.train, steps=2, lr=1e-9, warmup_steps=0))
    (tmp_path / "lm").mkdir()
    train_lm(settings, shards, TOKENIZER, tmp_path / "lm", "lm")
    was, now = weights(before), weights(tmp_path / "lm")
    for name in was:
        torch.testing.assert_close(now[name], was[name], atol=1e-6, rtol=0)
    assert not all(torch.equal(now[name], was[name]) for name in was)
    run = config.load(LMRun, tmp_path / "lm" / "run.json")
    assert not run.opening_marker
    assert (tmp_path / "lm" / run.continued_from).resolve() == before.resolve()
    assert (tmp_path / "lm" / BPE_FILE).read_bytes() == (before / BPE_FILE).read_bytes()
    assert checkpoint.load_state(checkpoint.latest(tmp_path / "lm"))["step"] == 2
    assert isinstance(load_scorer(tmp_path / "lm")[0], Scorer)


def test_what_does_not_fit_the_run_that_goes_on_is_refused(before, shards, tmp_path):  # noqa: F811
    settings = recipe("static", speech_pieces=40, continue_from=str(before))
    (tmp_path / "new").mkdir()

    def refused(said: str, folder=tmp_path / "new", **changes) -> None:
        with pytest.raises(ValueError, match=said):
            train_lm(replace(settings, **changes), shards, TOKENIZER, folder, "lm")

    refused("is the run's own folder", before)
    refused("holds a latent model, this run has kind=plain", model=PLAIN)
    refused(r"other sizes: model\.local_width=8 \(here 12\)", model=replace(LATENT, local_width=12))
    refused(r"other sizes: model\.global_\.ffn_width=32 \(here 64\)", model=wider())
    refused("has opening_marker=False, this run True", opening_marker="on")
    refused("has speech_pieces=40, this run None", speech_pieces=None)
    with pytest.raises(ValueError, match="a run has one start"):
        replace(settings, warm_start="base")
    info = json.loads((before / "run.json").read_text())
    (tmp_path / "other").mkdir()
    for name in ("config.json", "model.safetensors", BPE_FILE):
        (tmp_path / "other" / name).write_bytes((before / name).read_bytes())
    (tmp_path / "other" / "run.json").write_text(json.dumps(info | {"text_fingerprint": "another"}))
    refused("has text_fingerprint='another'", continue_from=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match=r"run\.json is missing"):
        train_lm(replace(settings, continue_from=str(tmp_path)), shards, TOKENIZER, tmp_path / "new", "lm")


def wider():
    return replace(LATENT, global_=replace(LATENT.global_, ffn_width=64))


def test_the_command_takes_sizes_and_patches_of_the_run_that_goes_on(before):
    start = TrainLM.starting_from(continue_from=str(before))
    assert start.recipe.model == saving.load(before).config
    assert (start.recipe.speech_pieces, start.recipe.patcher.patch_size) == (40, 4)
    assert start.kind == "latent"
    assert start.recipe.continue_from == str(before)
    assert TrainLM.starting_from(preset="toy", continue_from=str(before)).recipe.model != start.recipe.model


SPLIT = {"held_out": 0.1, "evaluate_every": 2}


def trained(shards, folder, **changes):  # noqa: F811
    settings = replace(recipe("static"), **changes)
    settings = replace(settings, train=replace(settings.train, steps=5, log_every=1))
    return train_lm(settings, shards, TOKENIZER, folder, "lm")


def test_held_out_losses_are_noted_and_measuring_changes_nothing(shards, tmp_path):  # noqa: F811
    found = trained(shards, tmp_path / "often", **SPLIT)
    lines = read_held_out(tmp_path / "often")
    assert [line["step"] for line in lines] == [2, 4, 5]
    for line in lines:
        assert line.keys() == {"step", "held_out_text", "held_out_speech", "held_out_parallel"}
        assert all(0 < line[f"held_out_{name}"] < 8 for name in shards)
    assert lines[-1]["held_out_text"] < lines[0]["held_out_text"]
    assert found["lm.lm.held_out_speech"] == lines[-1]["held_out_speech"]
    trained(shards, tmp_path / "once", held_out=0.1)
    assert [line["step"] for line in read_held_out(tmp_path / "once")] == [5]
    assert metrics(tmp_path / "often") == metrics(tmp_path / "once")
    once, often = weights(tmp_path / "once"), weights(tmp_path / "often")
    assert all(torch.equal(once[name], often[name]) for name in once)


def test_a_run_that_is_killed_while_it_measures_ends_the_same(shards, tmp_path, monkeypatch):  # noqa: F811
    trained(shards, tmp_path / "whole", **SPLIT)
    train, calls = Trainer.train, []

    def killed(self, stop_after=None):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(stop_after)
        return train(self, stop_after)

    monkeypatch.setattr(Trainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(shards, tmp_path / "cut", **SPLIT)
    monkeypatch.undo()
    held_out = tmp_path / "cut" / "held_out.json"
    held_out.write_text(json.dumps(json.loads(held_out.read_text())[:1]))  # as if it had not come to note the second
    trained(shards, tmp_path / "cut", **SPLIT)
    assert read_held_out(tmp_path / "cut") == read_held_out(tmp_path / "whole")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_documents_that_are_held_out_are_never_trained_on_in_any_source(shards, tmp_path):  # noqa: F811
    settings = replace(recipe("static"), held_out=0.1)
    data = open_data(settings, shards, TOKENIZER, tmp_path)
    everything = open_data(recipe("static"), shards, TOKENIZER, tmp_path)
    kept = {document.id for source in data.held_out.values() for document in source}
    assert 10 < len(kept) < 60
    for name, source in data.sources.items():
        trained_on = {source[i].id for i in range(len(source))}
        assert not trained_on & kept
        assert len(source) + len(data.held_out[name]) == len(everything.sources[name])
    mixture = data.mixture(settings)
    for _ in range(1500):  # more than an epoch of each
        assert mixture.draw()[1].id not in kept


def test_what_was_made_of_one_recording_or_text_is_held_out_together():
    assert place("x") == place("asr/x") == place("tts/x") == place("x/pass0") == place("x/pass12") == place("x+3")
    assert place("x") != place("y")


@given(share=st.floats(0.2, 0.8), count=st.integers(100, 150))
def test_a_split_is_whole_and_does_not_move_when_documents_come_in(share, count):
    documents = [replace(random_document(np.random.default_rng(i)), id=f"d{i}") for i in range(count)]
    ids = [d.id for d in documents]
    found, fewer = split("s", documents, ids, share), split("s", documents[:100], ids[:100], share)
    assert sorted([*found.train.indices, *found.held_out.indices]) == list(range(count))
    assert set(fewer.held_out.indices) == {i for i in found.held_out.indices if i < 100}
    assert all(place(found.held_out[i].id) < share for i in range(len(found.held_out)))
    with pytest.raises(ValueError, match="source 's' to train on"):
        split("s", documents, ids, 1e-9)


def test_a_run_folder_from_before_the_layout_was_a_setting_has_the_marker(before):
    data = json.loads((before / "run.json").read_text())
    assert data.pop("opening_marker") is False
    assert data.pop("continued_from") == ""
    assert config.from_dict(LMRun, data).vocab.opening_marker


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="has nothing to measure"):
        recipe(evaluate_every=3)
    with pytest.raises(ValueError, match=r"held_out=1\.0 must be a share"):
        recipe(held_out=1.0)
    with pytest.raises(ValueError, match="bos_token='<s>' names a token of a base"):
        recipe(bos_token="<s>")
