"""The tokenizer's training as a user starts it on many GPUs: two ranks, threads, held-out rates, one folder."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from speechquilt import config as configs
from speechquilt.commands.train_tokenizer import TrainTokenizer
from speechquilt.stages.held_out import read_held_out
from speechquilt.stages.speech_sources import SpeechSource
from speechquilt.tokenizer.supervised import SupervisedTokenizer
from speechquilt.train.metrics import read_metrics
from tests.unit.test_speech_corpora import write_folder
from tests.unit.test_tokenizer_recipe import RECIPE, TRAIN

ROOT = Path(__file__).parents[2]
CODES = 16


def test_two_ranks_train_from_a_folder_and_leave_one_tokenizer(tmp_path: Path) -> None:
    speech = tmp_path / "speech"
    speech.mkdir()
    write_folder(speech)
    model = replace(RECIPE.model, codebook_size=CODES, vq_restart_interval=1, vq_restart_threshold=0.9, vq_decay=0.5)
    recipe = replace(RECIPE, model=model, threads=1, evaluate_every=4, train=replace(TRAIN, rank_timeout_s=60.0))
    source = SpeechSource(kind="folder", path=str(speech))
    settings = TrainTokenizer(sources=(source,), held_out=(source,), recipe=recipe, run_dir=str(tmp_path / "run"))
    configs.save(settings, tmp_path / "settings.json")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    module = ["-m", "speechquilt.cli", "train", "tokenizer", f"--config={tmp_path / 'settings.json'}"]
    done = subprocess.run([*launcher, *module], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in read_held_out(tmp_path / "run")] == [4, 7]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert all({"codes", "perplexity", "dead", "total_restarts"} <= line.keys() for line in lines)
    restarts = [line["total_restarts"] for line in lines]
    assert restarts == sorted(restarts)
    assert 0 < restarts[-1] <= CODES * len(lines)
    assert restarts[-1] == round(restarts[-1])
    measured = read_held_out(tmp_path / "run")
    assert all({"wer", "cer", "wer_attention", "cer_attention"} <= line.keys() for line in measured)
    tokenizer = SupervisedTokenizer.load(tmp_path / "run")
    assert bool(tokenizer.quantizer.active)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["tokenizer.wer_n"] == 6
    assert {f"tokenizer.{key}" for key in ("wer", "cer", "codebook_used", "perplexity")} <= found.keys()
