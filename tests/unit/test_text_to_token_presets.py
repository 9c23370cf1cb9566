"""Sizes of the text-to-token model: as many parameters as their names say, and the table in the docs is the printed one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechquilt.commands import train_text_to_token as command
from speechquilt.commands.grammar import parse
from speechquilt.recipes import text_to_token_models
from speechquilt.text_to_token.network import TextToTokenConfig, TextToTokenLM

ROOT = Path(__file__).parents[2]
PARAMETERS = {"100M": 100e6, "500M": 500e6, "1.5B": 1.5e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_preset_has_the_size_of_its_name(name):
    with torch.device("meta"):
        model = TextToTokenLM(
            TextToTokenConfig(num_text=32_000, num_speech=16_384, llama=text_to_token_models.llama(name))
        )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.25)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"preset '1.5b' is unknown; did you mean 1\.5B"):
        text_to_token_models.llama("1.5b")


def test_the_command_trains_the_preset(monkeypatch, tmp_path):
    """`speechquilt train text_to_token --preset 1.5B` up to the training itself, which would take a cluster."""
    seen = []
    monkeypatch.setattr(command, "folder_corpus", lambda *_: type("Corpus", (), {"sentences": [], "held_out": []}))
    monkeypatch.setattr(command.loading, "load", lambda _: None)
    monkeypatch.setattr(command, "text_tokenizer_of", lambda *_: None)
    monkeypatch.setattr(command, "train_text_to_token", lambda recipe, *_, **__: seen.append(recipe.llama) or {})
    for flags in (["--preset", "1.5B"], ["--llama.num-layers", "3"]):
        parse(command.TrainTextToToken, [*flags, "--speech=x", f"--run-dir={tmp_path}/{len(seen)}"]).run()
    assert seen[0] == text_to_token_models.llama("1.5B")
    assert seen[1].num_layers == 3


def test_the_table_in_the_docs_is_what_the_benchmark_prints():
    command = [sys.executable, str(ROOT / "benchmarks" / "text_to_token.py"), "--sizes"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in (ROOT / "docs" / "how-to" / "text-to-token.md").read_text()
    assert printed.count("\n| ") == 1 + len(text_to_token_models.PRESETS)
