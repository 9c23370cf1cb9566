"""`speechquilt tokenize`: the tokens and documents of reading everything at once, whatever is broken, killed or long."""

import hashlib
import json
import multiprocessing
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechquilt.recipes
from speechquilt import audio, cli
from speechquilt.data.shards.documents import ShardFolder, read_documents
from speechquilt.data.shards.spoken import SpokenFolder
from speechquilt.data.sources.audio_files import End, Piece, cut
from speechquilt.data.sources.speech_folder import read_utterances
from speechquilt.jobs import bulk
from speechquilt.jobs import tokenize_audio as recipe
from speechquilt.recipes import own
from speechquilt.tokenizer import load
from speechquilt.types import Document, Utterance, Waveform
from tests import bulk_jobs
from tests.contracts.tiny_tokenizer import build
from tests.parity import tiny_tokenizers


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build().save(folder)
    return folder


def noise(seconds: float, rate: int, seed: int) -> Waveform:
    rng = np.random.default_rng(seed)
    samples_S = (0.2 * rng.standard_normal(round(seconds * rate))).clip(-1, 1).astype(np.float32)
    return Waveform(samples_S=samples_S, sample_rate=rate)


def content(folder: Path) -> dict[str, str]:
    """Every file of the shards and its digest; logs of a cluster aside."""
    files = (p for name in ("speech", "asr", "tts", "parallel") for p in (folder / name).rglob("*"))
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def plain(document: Document) -> tuple:
    """A document as data that can be compared."""
    segments = [
        (s.modality, s.ids_T.tolist(), None if s.unit_end_T is None else s.unit_end_T.tolist(), s.loss)
        for s in document.segments
    ]
    return document.id, document.source, segments


@pytest.fixture
def speech_folder(tmp_path) -> Path:
    """Recordings of many rates, with and without text and word times, longer and shorter than a window of 2.4 s."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows = []
    for i, rate in enumerate((8000, 16000, 22050, 44100, 48000)):
        audio.save(folder / f"{i}.wav", noise(0.3 + 1.7 * i, rate, seed=i))
        words = [["the", 0.0, 0.1], ["cat", 0.12, 0.25]] if i % 2 else None
        rows.append({"file_name": f"{i}.wav", "text": "the cat", "words": words})
    audio.save(folder / "silent.flac", noise(1.0, 16000, seed=9))
    rows.append({"file_name": "silent.flac"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_documents_are_those_of_a_corpus_in_memory(speech_folder, tokenizer_dir, tmp_path):
    bulk_jobs.tokenize(speech_folder, tmp_path / "bulk", tokenizer_dir, workers=1, files_per_shard=2, batch_seconds=3.0)
    utterances = [u for u in read_utterances(speech_folder, need_text=False) if isinstance(u, Utterance)]
    own.speech_shards(utterances, load(tokenizer_dir), tmp_path / "memory", [])
    for name in ("speech", "asr", "tts"):
        ours, theirs = ({d.id: plain(d) for d in read_documents(tmp_path / f / name)} for f in ("bulk", "memory"))
        if name == "speech":  # where the units of a recording without words end is unknown, not one unit
            (id, source, [(modality, ids, _, loss)]) = theirs["silent.flac"]
            theirs["silent.flac"] = (id, source, [(modality, ids, None, loss)])
        assert ours == theirs
    spoken, expected = SpokenFolder(tmp_path / "bulk" / "parallel"), SpokenFolder(tmp_path / "memory" / "parallel")
    assert [(s.id, s.words, s.ids_T.tolist(), s.word_T.tolist()) for s in (spoken[0], spoken[1])] == [
        (s.id, s.words, s.ids_T.tolist(), s.word_T.tolist()) for s in (expected[0], expected[1])
    ]
    assert len(spoken) == len(expected) == 2
    assert ShardFolder(tmp_path / "bulk" / "asr").info == ShardFolder(tmp_path / "memory" / "asr").info


def load_kind(kind: str, folder: Path) -> Any:
    if kind.startswith("ours"):
        return build(context_frames=48 if "context" in kind else 0)
    if kind == "HuBERT":
        tiny_tokenizers.hubert(folder)
    else:
        weights = tiny_tokenizers.glm4_voice_weights(tiny_tokenizers.GLM4_CONFIG, seed=1)
        tiny_tokenizers.write_glm4_voice(folder, tiny_tokenizers.GLM4_CONFIG, weights)
    return load(folder)


@pytest.fixture(scope="module", params=["ours", "ours, context", "GLM-4-Voice", "HuBERT"])
def any_tokenizer(request, tmp_path_factory) -> Any:
    return load_kind(request.param, tmp_path_factory.mktemp("kind"))


def offline(tokenizer: Any, samples_S: np.ndarray) -> list[int]:
    ids_BT, _ = tokenizer.encode(torch.from_numpy(samples_S)[None], torch.tensor([len(samples_S)]))
    return ids_BT[0].tolist()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 120_000), min_size=1, max_size=7), seed=st.integers(0, 9), data=st.data())
def test_any_batching_gives_the_offline_tokens(any_tokenizer, lengths, seed, data):
    """Recordings of up to 7.5 s in pieces of at most 2.4 s, in pools that cut recordings anywhere; some are rejected."""
    waves = [noise(n / 16000, 16000, seed + i).samples_S for i, n in enumerate(lengths)]
    rejected = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    sizes = recipe.piece_sizes(any_tokenizer)
    piece, repeated = min(sizes["piece_samples"], 38_400), sizes["repeated_samples"]

    def events():
        for i, wave_S in enumerate(waves):
            yield from cut([wave_S], i, piece, repeated)
            yield End(file=i, reject="late" if i in rejected else "", duration_s=len(wave_S) / 16000)

    batch_seconds = data.draw(st.sampled_from([0.3, 1.0, 60.0]))
    found = list(recipe.encode_stream(any_tokenizer, events(), batch_seconds))
    assert [end.file for end, _ in found] == list(range(len(waves)))
    for end, ids_T in found:
        if not end.reject:
            assert ids_T.dtype == np.int32
            assert ids_T.tolist() == offline(any_tokenizer, waves[end.file])


@pytest.mark.parametrize("context_frames", [0, 48])
def test_three_minutes_are_the_offline_tokens_while_little_waits(context_frames, tmp_path, monkeypatch):
    tokenizer_dir = tmp_path / "tokenizer"
    build(context_frames=context_frames).save(tokenizer_dir)
    (tmp_path / "in").mkdir()
    audio.save(tmp_path / "in" / "long.flac", noise(180.0, 24000, seed=1))
    pools: list[float] = []
    make_pools = recipe._pools

    def watched(events, pool_samples):
        for pool in make_pools(events, pool_samples):
            pools.append(sum(len(e.samples_S) for e in pool if isinstance(e, Piece)) / 16000)
            yield pool

    monkeypatch.setattr(recipe, "_pools", watched)
    bulk_jobs.tokenize(tmp_path / "in", tmp_path / "out", tokenizer_dir, workers=1, batch_seconds=2.0)
    (document,) = read_documents(tmp_path / "out" / "speech")
    whole_S = audio.resample(audio.load(tmp_path / "in" / "long.flac"), 16000).samples_S
    assert document.segments[0].ids_T.tolist() == offline(load(tokenizer_dir), whole_S)
    assert len(pools) > 9
    assert max(pools) <= recipe.POOL_BATCHES * 2.0 + 2.4


def test_bfloat16_is_another_job_with_nearly_the_same_tokens(speech_folder, tokenizer_dir, tmp_path):
    found = {}
    for dtype in ("float32", "bfloat16"):
        bulk_jobs.tokenize(speech_folder, tmp_path / dtype, tokenizer_dir, workers=1, dtype=dtype)
        found[dtype] = [d.segments[0].ids_T for d in read_documents(tmp_path / dtype / "speech")]
    assert [len(ids_T) for ids_T in found["float32"]] == [len(ids_T) for ids_T in found["bfloat16"]]
    same = np.concatenate([a == b for a, b in zip(*found.values())]).mean()
    assert (
        0.8 < same < 1.0
    )  # noise between codes that are noise: the worst case; equal would mean that nothing was changed
    with pytest.raises(ValueError, match="begun with other settings"):
        bulk_jobs.tokenize(speech_folder, tmp_path / "float32", tokenizer_dir, workers=1, dtype="bfloat16")


def tiny_corpus(folder: Path, num_files: int) -> set[str]:
    """Files of 50 ms in folders of 100, every hundredth broken in one of five ways; -> the names of the broken ones."""
    good = folder.parent / "good.wav"
    audio.save(good, noise(0.05, 16000, seed=0))
    data, bad = good.read_bytes(), set()
    faults = [b"", b"no audio", data[:20], data[:44], b"RIFF" + bytes(40)]
    for i in range(num_files):
        path = folder / f"{i // 100:03d}" / f"{i:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 100 == 17:
            bad.add(str(path.relative_to(folder)))
            path.write_bytes(faults[i // 100 % len(faults)])
        else:
            path.write_bytes(data)
    return bad


@pytest.mark.parametrize("num_files", [300, 10_000])
def test_one_percent_broken_and_nothing_lost(num_files, tokenizer_dir, tmp_path):
    bad = tiny_corpus(tmp_path / "in", num_files)
    bulk_jobs.tokenize(tmp_path / "in", tmp_path / "out", tokenizer_dir, workers=1, files_per_shard=128)
    documents = list(read_documents(tmp_path / "out" / "speech"))
    names = sorted(str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*.wav"))
    assert [d.id for d in documents] == [name for name in names if name not in bad]
    assert len({tuple(d.segments[0].ids_T.tolist()) for d in documents}) == 1
    assert all(d.segments[0].unit_end_T is None for d in documents)
    lines = (tmp_path / "out" / "speech" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == sorted(bad)
    assert sum(ShardFolder(tmp_path / "out" / "speech").manifest["rejects"].values()) == len(bad) == num_files // 100
    assert not (tmp_path / "out" / "asr").exists()


def test_two_workers_give_the_bytes_of_one(speech_folder, tokenizer_dir, tmp_path):
    for workers in (1, 2):
        command = ["tokenize", str(speech_folder), str(tmp_path / str(workers)), "--tokenizer", str(tokenizer_dir)]
        assert cli.main([*command, "--workers", str(workers), "--files-per-shard", "2", "--readers", str(workers)]) == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")
    # Three tasks with speech and pairs each, two of them with word times.
    assert sum(name.endswith(".parquet") for name in content(tmp_path / "1")) == 3 * 3 + 2


def test_killed_commands_go_on_to_the_same_bytes(tokenizer_dir, tmp_path):
    """SIGKILL three times, each when some more tasks are done and the next is at a random point."""
    rng = np.random.default_rng(0)
    tiny_corpus(tmp_path / "in", 300)
    keywords = {"workers": 1, "files_per_shard": 15}
    bulk_jobs.tokenize(tmp_path / "in", tmp_path / "whole", tokenizer_dir, **keywords)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["speechquilt.jobs.tokenize_audio", "hypothesis", "pytest"])
    killed = tmp_path / "killed"
    for round in range(3):
        child = processes.Process(
            target=bulk_jobs.tokenize, args=(tmp_path / "in", killed, tokenizer_dir), kwargs=keywords
        )
        child.start()
        while child.is_alive() and len(list(killed.glob("job/parts/??????"))) < 4 * round + 2:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert 0 < len(list(killed.glob("job/parts/??????"))) < 20
    bulk_jobs.tokenize(tmp_path / "in", killed, tokenizer_dir, **keywords)
    assert content(killed) == content(tmp_path / "whole")


def test_a_second_call_does_nothing_and_other_settings_are_refused(speech_folder, tokenizer_dir, tmp_path, capsys):
    command = [
        "tokenize",
        str(speech_folder),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer_dir),
        "--workers",
        "1",
    ]
    assert cli.main(command) == 0
    before = content(tmp_path / "out")
    assert cli.main(command) == 0
    assert "complete, skipped" in capsys.readouterr().out
    assert cli.main([*command, "--max-seconds", "1"]) == 2
    assert "begun with other settings or inputs" in capsys.readouterr().err
    assert content(tmp_path / "out") == before


def test_mistakes_are_named(speech_folder, tokenizer_dir, tmp_path, capsys):
    command = [
        "tokenize",
        str(speech_folder),
        str(tmp_path / "out"),
        "--tokenizer",
        str(tokenizer_dir),
        "--workers",
        "1",
    ]
    cases = [
        (["--readers", "0"], "readers=0 must be at least 1"),
        (["--batch-seconds", "-1"], "must be positive"),
        (["--files-per-shard", "0"], "items_per_task=0 must be at least 1"),
        (["--max-seconds", "1"], "above max_reject_ratio=0.1"),
    ]
    for extra, message in cases:
        assert cli.main(command + extra) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*command, "--max-seconds", "1", "--max-reject-ratio", "1"]) == 0  # no task was done again
    assert "longer than 1 s" in (tmp_path / "out" / "speech" / "rejects.jsonl").read_text()


def test_a_released_tokenizer_makes_speech_without_pairs(speech_folder, tmp_path):
    folder = tmp_path / "glm"
    load_kind("GLM-4-Voice", folder)
    bulk_jobs.tokenize(speech_folder, tmp_path / "out", folder, workers=1)
    speech = ShardFolder(tmp_path / "out" / "speech")
    assert (len(speech), speech.info.num_text, speech.info.text_fingerprint) == (6, 0, "")
    assert not (tmp_path / "out" / "asr").exists()
    assert len(SpokenFolder(tmp_path / "out" / "parallel")) == 2


SBATCH = """#!{python}
# A Slurm of one machine: runs the job array of the script that it is given at once, and prints the job's number.
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
last = int(re.search(r"--array=0-(\\d+)", text)[1])
for i in range(last + 1):
    environment = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), SLURM_NODELIST="here", RUN_OFFSET="0")
    log = open(os.path.join({logs!r}, f"{{os.getpid()}}-{{i}}.out"), "w")
    subprocess.run(["bash", script], env=environment, check=True, stdout=log, stderr=subprocess.STDOUT)
open(os.path.join({logs!r}, "calls"), "a").write(" ".join(sys.argv[1:-1]) + "\\n")
print("Submitted batch job", os.getpid())
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_on_slurm(speech_folder, tokenizer_dir, tmp_path, monkeypatch):
    """datatrove's own script, submitted to an sbatch that runs it here: the shards are those of a local run."""
    pytest.importorskip("datatrove", reason="datatrove is the extra `cluster`")
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(programs / "sbatch", SBATCH.format(python=sys.executable, logs=str(tmp_path)))
    executable(programs / "srun", SRUN)
    executable(programs / "scontrol", "#!/bin/bash\necho here\n")
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    bulk_jobs.tokenize(speech_folder, tmp_path / "local", tokenizer_dir, workers=1, files_per_shard=3)
    bulk_jobs.tokenize(
        speech_folder,
        tmp_path / "slurm",
        tokenizer_dir,
        files_per_shard=3,
        executor="slurm",
        cluster={"partition": "speech", "time": "1:00:00", "sbatch_args": '{"account": "quilt"}'},
    )
    assert content(tmp_path / "slurm") == content(tmp_path / "local")
    (script,) = (tmp_path / "slurm" / bulk.JOB_FOLDER).rglob("task_logs/launch_script.slurm")
    for line in ("--partition=speech", "--time=1:00:00", "--account=quilt", "--array=0-1"):
        assert line in script.read_text()
    assert "--dependency=afterok:" in (tmp_path / "calls").read_text()  # the merge waits for the tasks


def test_cluster_settings_are_checked(speech_folder, tokenizer_dir, tmp_path, capsys):
    pytest.importorskip("datatrove", reason="datatrove is the extra `cluster`")
    command = ["tokenize", str(speech_folder), str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)]
    assert cli.main([*command, "--executor", "slurm", "--cluster", "partitoin=x"]) == 2
    assert "did you mean partition" in capsys.readouterr().err
    assert cli.main([*command, "--executor", "slurm", "--cluster", "partition=x"]) == 2
    assert "add --cluster time=..." in capsys.readouterr().err


def test_without_datatrove_the_extra_is_named(speech_folder, tokenizer_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.setitem(sys.modules, "datatrove.executor", None)
    monkeypatch.delitem(sys.modules, "speechquilt.jobs.cluster", raising=False)
    monkeypatch.delattr(speechquilt.recipes, "cluster", raising=False)
    command = ["tokenize", str(speech_folder), str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir)]
    assert cli.main([*command, "--executor", "ray"]) == 2
    assert "pip install speechquilt[cluster]" in capsys.readouterr().err


def test_noise_in_headers_never_stops_a_job(tokenizer_dir, tmp_path):
    """Thirty damaged files through the whole command: each is a document or a counted reject."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        path = tmp_path / "in" / f"{i:02d}.wav"
        soundfile.write(path, noise(0.2, 16000, seed=i).samples_S, 16000)
        data = bytearray(path.read_bytes())
        data[int(rng.integers(0, 44))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
    bulk_jobs.tokenize(
        tmp_path / "in", tmp_path / "out", tokenizer_dir, workers=1, max_seconds=30.0, max_reject_ratio=0.99
    )
    shards = ShardFolder(tmp_path / "out" / "speech")
    assert len(shards) + sum(shards.manifest["rejects"].values()) == 30
    assert 0 < len(shards) < 30
