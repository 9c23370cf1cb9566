"""Epochs of a training run: counted in metrics.jsonl, bounded, and an end that says what to do."""

from dataclasses import replace

import pytest

from speechquilt import cli
from speechquilt.data.feed.mixture import Exhausted
from speechquilt.stages.train_lm import train_lm
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train import checkpoint
from speechquilt.train.metrics import read_metrics
from tests.contracts import tiny_tokenizer
from tests.e2e.test_train_lm import RECIPE
from tests.unit.test_budget import TOKENIZER, shards  # noqa: F401 (a fixture)

SHORT = replace(RECIPE, train=replace(RECIPE.train, steps=12, log_every=1), pack=replace(RECIPE.pack, buffer=8))


def test_a_source_leaves_and_the_metrics_show_it(shards, tmp_path):  # noqa: F811
    recipe = replace(SHORT, max_epochs={"speech": 0.02})  # 6 documents
    with pytest.warns(UserWarning, match=r"source 'speech' has given its max_epochs=0.02 and leaves the mixture"):
        train_lm(recipe, shards, TOKENIZER, tmp_path / "run", "lm")
    lines = read_metrics(tmp_path / "run")
    speech = [line["total_epochs_speech"] for line in lines]
    assert speech == sorted(speech)
    assert speech[-3] == speech[-1] == pytest.approx(0.02)
    for source in ("text", "parallel"):
        assert lines[-1][f"total_epochs_{source}"] > lines[-3][f"total_epochs_{source}"]


def test_a_run_whose_sources_have_all_left_ends_with_an_error(shards, tmp_path):  # noqa: F811
    recipe = replace(SHORT, max_epochs=dict.fromkeys(RECIPE.weights, 0.1))
    with (
        pytest.warns(UserWarning, match="leaves the mixture"),
        pytest.raises(Exhausted, match=r"batch \d+ of 12 cannot be filled.*train for fewer steps"),
    ):
        train_lm(recipe, shards, TOKENIZER, tmp_path / "run", "lm")


def test_a_bound_on_nothing_is_refused():
    with pytest.raises(ValueError, match="did you mean speech"):
        replace(RECIPE, max_epochs={"speach": 1.0})


def test_the_command_takes_a_preset_bounds_and_joined_recordings(shards, tmp_path, capsys, monkeypatch):  # noqa: F811
    replace(tiny_tokenizer.CONFIG, text_vocab_size=TOKENIZER.size).build(TOKENIZER).save(tmp_path / "tokenizer")
    monkeypatch.setattr(SupervisedTokenizer, "fingerprint", "speech-a")  # that of the shards
    paths = [f"{name}={shards[name]}" for name in ("text", "parallel")]
    small = ["--pack.rows=2", "--train.steps=3", "--train.warmup-steps=1", "--train.log-every=1", "--train.device=cpu"]
    names = ["--data", *paths, f"--tokenizer={tmp_path / 'tokenizer'}", f"--run-dir={tmp_path / 'run'}"]
    options = [
        "--mixture=lst_paper",
        "--max-epochs",
        "text=2",
        "--join.max-tokens=750",
        r"--join.session=(u)\d+",
        "--map-shards",
    ]
    assert cli.main(["train", "lm", *names, *options, *small]) == 0, capsys.readouterr().err
    assert "mixture  text 66.7%, parallel 33.3%" in capsys.readouterr().out
    state = checkpoint.load_state(checkpoint.latest(tmp_path / "run"))["loader"]["mixture"]["made_for"]
    assert state["max_epochs"] == {"text": 2}
    assert state["documents"]["text"] == 300
    assert 10 < state["documents"]["parallel"] < 200  # 300 recordings, joined
    assert cli.main(["train", "lm", *names, "--mixture=lst_papr"]) == 2
    assert "did you mean lst_paper" in capsys.readouterr().err
