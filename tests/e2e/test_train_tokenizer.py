"""The tokenizer's training as a user starts it on many GPUs: two ranks, threads, held-out rates, one folder."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from speechquilt import config as configs
from speechquilt.recipes.tokenizer import read_held_out
from speechquilt.tokenizer.model import SpeechTokenizer
from speechquilt.train.metrics import read_metrics
from tests.unit.test_speech_corpora import write_folder
from tests.unit.test_tokenizer_recipe import RECIPE, TRAIN

ROOT = Path(__file__).parents[2]


def test_two_ranks_train_from_a_folder_and_leave_one_tokenizer(tmp_path: Path) -> None:
    speech = tmp_path / "speech"
    speech.mkdir()
    write_folder(speech)
    recipe = replace(RECIPE, threads=1, evaluate_every=4, train=replace(TRAIN, rank_timeout_s=60.0))
    source = json.dumps([{"kind": "folder", "path": str(speech)}])
    settings = [f"sources={source}", f"held_out={source}", f"recipe={json.dumps(configs.to_dict(recipe))}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    module = ["-m", "speechquilt.cli", "train", "tokenizer", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*launcher, *module, *settings], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_held_out(tmp_path / "run")] == [4, 7]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 8))
    tokenizer = SpeechTokenizer.load(tmp_path / "run")
    assert bool(tokenizer.quantizer.active)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tokenizer.wer_n"] == 6
