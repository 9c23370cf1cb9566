"""`speechquilt plan`: the papers' runs come out at the papers' size."""

import json

import pytest

from speechquilt.cli import main
from speechquilt.commands.plan import RECIPES, plan
from speechquilt.recipes import tokenizers


def stage(data, name):
    return next(s for s in data["stages"] if s["name"] == name)


def test_the_lst_papers_run_is_planned_within_a_quarter_of_its_17_hours() -> None:
    """Spec latent-speech-text 7: 200k steps of 0.5M units, about 17 hours on 32 H100."""
    pretrain = stage(plan("lst_1b", 32, "h100", 0.5), "pretrain")
    assert pretrain["amount"] == pytest.approx(0.105e12, rel=0.01)
    assert pretrain["hours"] == pytest.approx(17, rel=0.25)


def test_the_first_papers_spans_take_as_long_as_it_says() -> None:
    """Spec synthetic-interleaved 4: 455B tokens are about 210 days of one H800."""
    spans = stage(plan("interleaved_9b", 1, "h100", 0.4), "interleave")
    assert spans["gpu_hours"] / spans["amount"] * 455e9 / 24 == pytest.approx(210, rel=0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_twice_the_gpus_take_half_the_time_and_less_memory(recipe: str) -> None:
    few, many = plan(recipe, 8, "h200", 0.4), plan(recipe, 16, "h200", 0.4)
    assert few["hours"] == pytest.approx(2 * many["hours"])
    assert few["gpu_hours"] == pytest.approx(many["gpu_hours"])
    if any(s["name"] == "pretrain" for s in few["stages"]):  # a tokenizer is not sharded
        assert stage(few, "pretrain")["memory_gib"] > stage(many, "pretrain")["memory_gib"]


def test_the_tokenizers_cost_what_their_presets_say() -> None:
    for name, ranks in (("large", tokenizers.PAPER_RANKS), ("small", 1)):
        found = plan(f"tokenizer_{name}", 4, "h100", 0.4)
        expected = tokenizers.cost(tokenizers.RECIPES[name], ranks=ranks)
        assert found["gpu_hours"] == pytest.approx(expected.gpu_hours)
        assert stage(found, "tokenizer")["amount"] == pytest.approx(expected.audio_hours * 3600)
    assert found["gpu_hours"] < 24  # one GPU finishes it in hours


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "interleaved_9b", "--gpus", "1", "--gpu", "a100"]) == 0
    table = capsys.readouterr().out
    assert "pretrain" in table
    assert " !" in table  # a 9B model does not fit on one A100
    assert main(["plan", "lst_1b", "--gpus", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 32


@pytest.mark.parametrize("arguments", [["lst_2b"], ["lst_1b", "--gpu", "h10"], ["lst_1b", "--gpus", "0"]])
def test_mistakes_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert "speechquilt:" in capsys.readouterr().err
