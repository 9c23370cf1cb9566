"""A run folder says where its speech tokenizer is."""

from dataclasses import replace
from pathlib import Path

import pytest

from speechquilt.model.patcher import PatcherConfig
from speechquilt.stages.train_lm import LMRun, tokenizer_folder

RUN = LMRun(num_text=9, num_speech=9, text_fingerprint="t", speech_fingerprint="s", patcher=PatcherConfig(kind="none"))


@pytest.mark.parametrize(
    ("noted", "inside", "found"),
    [
        ("", False, "story/tokenizer"),  # a story of before it was noted
        ("../../../other/tokenizer", False, "other/tokenizer"),
        ("", True, "story/lm/a/tokenizer"),
        ("../../../other/tokenizer", True, "story/lm/a/tokenizer"),
    ],
)
def test_the_tokenizer_lies_inside_or_where_the_run_says(tmp_path: Path, noted: str, inside: bool, found: str):
    lm = tmp_path / "story" / "lm" / "a"
    lm.mkdir(parents=True)
    if inside:
        (lm / "tokenizer").mkdir()
    assert tokenizer_folder(lm, replace(RUN, tokenizer=noted)) == tmp_path / found
