"""The whole story, tiny: killed in the middle and run again it ends with the numbers of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from speechquilt.evals.results import read_results
from speechquilt.recipes.toy import report_data
from speechquilt.recipes.toy.schema import SCHEMA

SETTINGS = [
    "--voices.voices", "en-us", "en+f4",
    "--corpus.sentences=24", "--corpus.held_out=4", "--corpus.story_documents=8", "--corpus.fact_documents=4",
    "--tokenizer.train.steps=6", "--tokenizer.train.warmup_steps=1", "--tokenizer.train.num_threads=1",
    "--tokenizer.train.checkpoint_every=2", "--tokenizer.batch_seconds=8",
    "--tokenizer.model.width=32", "--tokenizer.model.ffn_width=64", "--tokenizer.model.codebook_size=32",
    "--tokenizer.model.vq_warmup_updates=3",
    "--text_to_token.train.steps=4", "--text_to_token.train.warmup_steps=1", "--text_to_token.train.num_threads=1",
    "--text_to_token.llama.width=32", "--text_to_token.llama.num_layers=1", "--text_to_token.llama.ffn_width=64",
    "--text_to_token.data.rows=2", "--interleave_passes=1",
    "--lm.train.steps=4", "--lm.train.warmup_steps=1", "--lm.train.checkpoint_every=1", "--lm.pack.rows=2", "--num_stories=2",
    "--decoder.first=steps=2,lr=0.001,num_threads=1,seed=1", "--decoder.train.steps=2", "--decoder.train.warmup_steps=1",
    "--decoder.train.num_threads=1", "--decoder.train.checkpoint_every=1",
    "--decoder.phases.rounds=1", "--num_heard=3",
]  # fmt: skip
TIMED = ("seconds", "run.fingerprint", "real_time_factor")


def start(run_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "speechquilt.cli", "story", "toy", f"--run-dir={run_dir}", *SETTINGS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread())


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen, begun: Path) -> None:
    """SIGKILL as soon as `begun` exists; the process must not have ended by itself."""
    while not begun.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def numbers(run_dir: Path) -> dict:
    return {k: v for k, v in read_results(run_dir / "results.json", SCHEMA).items() if not k.endswith(TIMED)}


def test_a_killed_story_ends_like_an_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(start(killed), killed / "tokenizer" / "checkpoints" / "step_00000002" / "state.json")
    kill_when(start(killed), killed / "shards" / "speech")
    kill_when(start(killed), killed / "lm" / "curriculum" / "checkpoints" / "step_00000001")
    kill_when(start(killed), killed / "decoder" / "checkpoints" / "step_00000001")
    output = finish(start(killed))
    assert "[tokenizer] complete, skipped" in output
    finish(start(whole))
    assert numbers(killed) == numbers(whole)

    assert report_data.main([str(whole / "results.json")]) == 0  # every promised number is there
    flat = json.loads((whole / "results.json").read_text())
    assert flat["tokenizer.streaming_equals_offline"] is True
    report = (whole / "report.html").read_text()
    assert "MISSED" in report  # a model of four steps keeps few promises, and the page says so
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert finish(start(whole)).count("complete, skipped") == 6


def test_a_missing_number_is_noticed(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"tokenizer.wer": 0.01}')
    assert report_data.main([str(tmp_path / "results.json")]) == 1
    assert "missing: text_to_token.wer" in capsys.readouterr().out
