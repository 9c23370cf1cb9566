"""`speechquilt plan`: the papers' runs come out at the papers' size."""

import json

import pytest

from speechquilt.cli import main
from speechquilt.commands.plan import Plan
from speechquilt.recipes import catalog, tokenizers
from speechquilt.stages import cost


def plan(recipe: str, gpus: int, gpu: str, mfu: float) -> dict:
    return Plan(recipe=recipe, gpus=gpus, gpu=gpu, mfu=mfu).priced()


def stage(data, name):
    return next(s for s in data["stages"] if s["name"] == name)


def test_the_lst_papers_run_is_planned_within_a_quarter_of_its_17_hours() -> None:
    """Spec latent-speech-text 7: 200k steps of 0.5M units, about 17 hours on 32 H100."""
    pretrain = stage(plan("lst_1_4b", 32, "h100", 0.5), "pretrain")
    assert pretrain["amount"] == pytest.approx(0.105e12, rel=0.01)
    assert pretrain["hours"] == pytest.approx(17, rel=0.25)


def test_the_first_papers_spans_take_as_long_as_it_says() -> None:
    """Spec synthetic-interleaved 4: 455B tokens are about 210 days of one H800."""
    spans = stage(plan("interleaved_9b", 1, "h100", 0.4), "interleave")
    assert spans["gpu_hours"] / spans["amount"] * 455e9 / 24 == pytest.approx(210, rel=0.01)


@pytest.mark.parametrize("recipe", catalog.ENTRIES)
def test_twice_the_gpus_take_half_the_time_and_less_memory(recipe: str) -> None:
    few, many = plan(recipe, 8, "h200", 0.4), plan(recipe, 16, "h200", 0.4)
    assert few["hours"] == pytest.approx(2 * many["hours"])
    assert few["gpu_hours"] == pytest.approx(many["gpu_hours"])
    if any(s["name"] == "pretrain" for s in few["stages"]):  # a tokenizer is not sharded
        assert stage(few, "pretrain")["memory_gib"] > stage(many, "pretrain")["memory_gib"]


def test_the_tokenizers_cost_what_their_presets_say() -> None:
    for name, ranks in (("large", tokenizers.PAPER_RANKS), ("small", 1)):
        found = plan(f"tokenizer_{name}", 4, "h100", 0.4)
        recipe = tokenizers.RECIPES[f"tokenizer_{name}"].recipe
        machine = cost.Machine(gpu=cost.GPUS["h100"], gpus=4, mfu=0.4)
        expected = cost.tokenizer_training(recipe, ranks, machine)
        assert found["gpu_hours"] == pytest.approx(expected.gpu_hours)
        assert stage(found, "tokenizer")["amount"] == pytest.approx(cost.audio_seconds(recipe, ranks))
    assert found["gpu_hours"] < 24  # one GPU finishes it in hours


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "interleaved_9b", "--gpus", "1", "--gpu", "a100"]) == 0
    table = capsys.readouterr().out
    assert "pretrain" in table
    assert " !" in table  # a 9B model does not fit on one A100
    assert main(["plan", "lst_1_4b", "--gpus", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpus"] == 32


@pytest.mark.parametrize("arguments", [["lst_2_4b"], ["lst_1_4b", "--gpu", "h10"], ["lst_1_4b", "--gpus", "0"]])
def test_mistakes_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert "speechquilt:" in capsys.readouterr().err
