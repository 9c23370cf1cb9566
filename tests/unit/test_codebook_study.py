"""The study of the codebook: conditions differ in one thing, and a small one leaves a row for each, also after a stop."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from speechquilt.config import to_dict
from speechquilt.studies import codebook
from speechquilt.studies.codebook import CONDITIONS, CodebookConfig, study
from tests.parity.tiny_tokenizers import whisper
from tests.unit.test_speech_corpora import write_folder
from tests.unit.test_tokenizer_recipe import FIRST_RUN

CONFIG = CodebookConfig()


def test_every_condition_changes_the_default_in_one_thing() -> None:
    default = to_dict(CONFIG.recipe("default"))
    for name in CONDITIONS:
        changed = to_dict(CONFIG.recipe(name))
        differing = {key for key in default if default[key] != changed[key]}
        assert len(differing) == {"default": 0, "no run before": 3}.get(name, 1), name
    whole = CONFIG.recipe("no run before")
    assert (whole.first, whole.train.steps) == (None, CONFIG.first_steps + CONFIG.steps)
    with pytest.raises(ValueError, match="'none' must be one of"):
        replace(CONFIG, conditions=("none",))


def test_a_study_that_is_stopped_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper(tmp_path / "whisper")
    for name in ("train", "held_out", "unseen_voice"):
        (tmp_path / "corpus" / name).mkdir(parents=True)
        write_folder(tmp_path / "corpus" / name)
    model = replace(
        FIRST_RUN.model, layers_below=1, max_frames=80, block_frames=16, codebook_size=8, read_back_head="attention"
    )
    config = replace(
        CONFIG, run_dir=str(tmp_path / "study"), corpus=str(tmp_path / "corpus"), first_steps=2, steps=3, sentences=2,
        conditions=("default", "one rate for all"),
        tokenizer=replace(FIRST_RUN, model=model, start=str(tmp_path / "whisper"), batch_seconds=20.0),
    )  # fmt: skip
    trained = []
    train = codebook.train_tokenizer
    monkeypatch.setattr(codebook, "train_tokenizer", lambda *a: (trained.append(a[0]), train(*a))[1])
    study(replace(config, conditions=("default",)))
    rows = json.loads(study(config).read_text())
    assert len(trained) == 2
    assert set(rows) == {"default", "one rate for all"}
    for row in rows.values():
        assert row["codebook.codes_in_a_batch.last"] > 0
        assert {"codebook.held_out.wer", "codebook.unseen_voice.wer", "codebook.warnings"} <= row.keys()
