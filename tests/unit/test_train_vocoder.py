"""The training of a vocoder as a stage: it learns, resumes to the last bit, keeps its held-out recordings apart.

Planted and caught: the number of the batch left out of the loader's state, so that discriminators begin late after a kill;
held-out recordings that are trained on.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from speechquilt.cli import main
from speechquilt.commands.grammar import parse
from speechquilt.commands.train_vocoder import TrainVocoder
from speechquilt.config import to_dict
from speechquilt.data.sources.speech_corpora import FolderCorpus
from speechquilt.decoder import vocoder_folder
from speechquilt.decoder.vocos import Vocos, VocosConfig
from speechquilt.evals.results import Schema
from speechquilt.files import write_json
from speechquilt.protocols import Vocoder
from speechquilt.stages import cost
from speechquilt.stages.train_vocoder import MEASURES, held_out_numbers, measure_vocoder, train_vocoder
from speechquilt.train.metrics import read_metrics
from speechquilt.train.objectives.vocoder_gan import GanConfig, vocoder_objective
from speechquilt.types import WaveBatch
from tests.e2e.test_resume import assert_same_run
from tests.unit.tiny_vocoder import JUDGES, MEL, RECIPE, write_tones


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> FolderCorpus:
    return FolderCorpus(write_tones(tmp_path_factory.mktemp("speech") / "tones"), need_text=False)


def late(after: int, **changes: Any) -> Any:
    """Discriminators begin at step `after` + 1."""
    return replace(RECIPE, gan=replace(RECIPE.gan, after=after), **changes)  # type: ignore[type-var]


def test_it_learns_and_is_saved_with_what_was_measured(corpus: FolderCorpus, tmp_path: Path) -> None:
    train = replace(RECIPE.train, steps=120, checkpoint_every=120, warmup_steps=10)
    recipe = replace(RECIPE, train=train, gan=None)
    found = train_vocoder(recipe, corpus, tmp_path)
    Schema(MEASURES).check(found)
    vocoder = vocoder_folder.load(tmp_path)
    assert isinstance(vocoder, Vocos)
    assert isinstance(vocoder, Vocoder)
    assert found["vocoder.parameters"] == sum(p.numel() for p in vocoder.parameters())
    held_out, _ = held_out_numbers(len(corpus))
    again = measure_vocoder(vocoder, corpus, held_out, 2)
    assert again["vocoder.mel_distance"] == pytest.approx(found["vocoder.mel_distance"])
    start = measure_vocoder(recipe.build().generator.eval(), corpus, held_out, 2)
    assert found["vocoder.mel_distance"] < 0.5 * start["vocoder.mel_distance"]
    assert start["vocoder.mel_distance_phase"] == found["vocoder.mel_distance_phase"] > 0


@pytest.mark.parametrize("threads", [0, 2])
def test_a_killed_run_ends_like_an_uninterrupted_one(corpus: FolderCorpus, tmp_path: Path, threads: int) -> None:
    """Killed behind step 4; discriminators begin at step 6, and two batches make a step."""
    recipe = late(5, train=replace(RECIPE.train, accumulate=2), crops=replace(RECIPE.crops, threads=threads))
    train_vocoder(recipe, corpus, tmp_path / "whole")
    train_vocoder(recipe, corpus, tmp_path / "again")
    for path in sorted((tmp_path / "again" / "checkpoints" / "step_00000008").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "again" / "checkpoints" / "step_00000008").rmdir()
    train_vocoder(recipe, corpus, tmp_path / "again")
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    begun = {line["step"]: "told_apart" in line for line in read_metrics(tmp_path / "whole")}
    assert begun == {1: False, 2: False, 4: False, 6: True, 8: True}


def test_held_out_recordings_are_not_trained_on(corpus: FolderCorpus, tmp_path: Path) -> None:
    """Whatever they hold: with other sound in them, the same vocoder comes out."""
    for name, other in (("a", 0), ("b", 5)):
        folder = write_tones(tmp_path / name)
        (folder / "00.wav").write_bytes((folder / f"{other:02d}.wav").read_bytes())
        train_vocoder(RECIPE, FolderCorpus(folder, need_text=False), tmp_path / f"run_{name}")
    a, b = (vocoder_folder.load(tmp_path / f"run_{name}").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert held_out_numbers(41) == ([0, 20, 40], [n for n in range(41) if n % 20])
    assert held_out_numbers(2) == ([0], [1])


@pytest.mark.parametrize("judged", [True, False])
def test_flops_are_those_that_torch_counts(judged: bool) -> None:
    """Its counter takes the weights' gradient of a convolution in groups for that of one without."""
    recipe = replace(RECIPE, gan=RECIPE.gan if judged else None)
    model, rows, samples = recipe.build(), 1, recipe.crops.samples
    with FlopCounterMode(display=False) as counted:
        vocoder_objective(model, WaveBatch(wav_BS=0.1 * torch.randn(rows, samples), number=0))[0].backward()
    frames, width = samples // MEL.hop, recipe.vocoder.width
    wasted = 2 * frames * recipe.vocoder.kernel * width * (width - 1) * recipe.vocoder.num_layers
    assert cost.vocoder_flops(recipe, judged=judged) == pytest.approx(counted.get_total_flops() - wasted, rel=2e-3)


def test_the_command_trains_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tones(tmp_path / "tones", rate=16_000)
    tiny = ["--vocoder.width", "16", "--vocoder.ffn-width", "24", "--vocoder.num-layers", "1", "--crops.rows", "2"]
    tiny += ["--train.steps", "2", "--train.warmup-steps", "1", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "vocoder", "--speech", str(folder), *tiny]) == 0
    assert "vocoder.mel_distance_phase" in capsys.readouterr().out
    assert vocoder_folder.load(tmp_path / "run").mel == VocosConfig().mel
    assert main(["train", "vocoder", *tiny]) == 2
    assert "give --speech FOLDER" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 22khz"):
        TrainVocoder.starting_from("22kh")


def test_discriminators_are_left_out_or_chosen_on_the_line(tmp_path: Path) -> None:
    assert parse(TrainVocoder, ["--preset", "22khz", "--gan", "none"]).recipe.gan is None
    assert parse(TrainVocoder, ["--preset", "22khz"]).recipe.gan == GanConfig()
    write_json(tmp_path / "gan.json", to_dict(RECIPE.gan))
    assert parse(TrainVocoder, ["--gan", str(tmp_path / "gan.json")]).recipe.gan == RECIPE.gan


def test_a_recipe_that_cannot_work_is_refused(corpus: FolderCorpus, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"loss_mels": ()}, "loss_mels is empty"),
        ({"loss_mels": (replace(MEL, sample_rate=16_000),)}, "sample_rate=16000"),
        ({"crops": replace(RECIPE.crops, samples=1000)}, "multiple of hop=32"),
        ({"crops": replace(RECIPE.crops, samples=256)}, "must be more than 256"),
        ({"gan": replace(RECIPE.gan, after=8)}, "below train.steps=8"),  # type: ignore[type-var]
        ({"gan": replace(RECIPE.gan, discriminators=replace(JUDGES, windows=(4096,)))}, "must be more than 4096"),  # type: ignore[type-var]
        ({"train": replace(RECIPE.train, shard="full")}, "train.shard='full'"),
        ({"held_out_recordings": 0}, "held_out_recordings"),
    ]
    for changes, told in wrong:
        with pytest.raises(ValueError, match=told):
            replace(RECIPE, **changes)
    folder = write_tones(tmp_path / "one", count=1)
    with pytest.raises(ValueError, match="none of 0 recordings"):
        train_vocoder(RECIPE, FolderCorpus(folder, need_text=False), tmp_path / "run")
