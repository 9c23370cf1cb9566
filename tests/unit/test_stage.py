"""Stages: made once, skipped when complete, never overwritten by other settings."""

import os

import pytest

from speechquilt.config import load
from speechquilt.stages.stage import SETTINGS, Story, remembered
from speechquilt.train.spec_augment import SpecAugmentConfig


def run(run_dir, settings, made, fail=False):
    story = Story(run_dir)

    def make(folder):
        made.append(folder.name)
        if fail:
            raise RuntimeError("killed")
        return {"x": settings}

    story.stage("first", 1, make, what="one")
    story.stage("second", settings, make, what="two")
    return story


def test_a_complete_stage_is_skipped_and_its_results_stay(tmp_path):
    made: list[str] = []
    run(tmp_path, 2, made)
    assert run(tmp_path, 2, made).results == {"x": 2}
    assert made == ["first", "second"]


def test_an_interrupted_stage_is_made_again(tmp_path):
    made: list[str] = []
    with pytest.raises(RuntimeError):
        run(tmp_path, 2, made, fail=True)
    run(tmp_path, 2, made)
    assert made == ["first", "first", "second"]


def test_other_settings_are_an_error_and_touch_nothing(tmp_path):
    made: list[str] = []
    run(tmp_path, 2, made)
    with pytest.raises(ValueError, match=r"second was made with other settings.*choose another --run-dir"):
        run(tmp_path, 3, made)
    assert made == ["first", "second"]


def test_an_earlier_stage_decides_too(tmp_path):
    story = Story(tmp_path)
    story.stage("first", 1, lambda folder: {}, what="one")
    story.stage("second", 1, lambda folder: {}, what="two")
    other = Story(tmp_path, fingerprint="something else came before")
    with pytest.raises(ValueError, match="first was made with other settings"):
        other.stage("first", 1, lambda folder: {}, what="one")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose a writable folder"):
        Story(tmp_path / "file").stage("first", 1, lambda folder: {}, what="one")
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="closed"):
            Story(tmp_path / "closed").stage("first", 1, lambda folder: {}, what="one")


def test_a_run_folder_keeps_the_settings_that_were_accepted(tmp_path):
    """Those of a killed run stay, those that were refused never do."""
    first, second = SpecAugmentConfig(time_frames=1), SpecAugmentConfig(time_frames=2)
    with pytest.raises(ValueError, match="no"), remembered(first, tmp_path / "run"):
        raise ValueError("no")
    assert not (tmp_path / "run" / SETTINGS).exists()
    with pytest.raises(KeyboardInterrupt), remembered(first, tmp_path / "run"):
        raise KeyboardInterrupt
    assert load(SpecAugmentConfig, tmp_path / "run" / SETTINGS) == first
    with pytest.raises(ValueError, match="other settings"), remembered(second, tmp_path / "run"):
        raise ValueError("made with other settings")
    assert load(SpecAugmentConfig, tmp_path / "run" / SETTINGS) == first
    with remembered(second, tmp_path / "run", writes=False):
        pass
    assert load(SpecAugmentConfig, tmp_path / "run" / SETTINGS) == first
