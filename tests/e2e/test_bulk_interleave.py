"""`speechquilt interleave`: the documents of a corpus in memory, and the same bytes whatever is broken, killed or shared out."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt import cli
from speechquilt.data.interleaving import synthetic
from speechquilt.data.interleaving.synthetic import InterleaveConfig, split_words
from speechquilt.data.shards.documents import ShardFolder, read_documents
from speechquilt.evals.noise import NoiseMeter
from speechquilt.jobs import bulk, progress
from speechquilt.jobs import interleave_text as recipe
from speechquilt.nn.llama import LlamaConfig
from speechquilt.text_to_token import network
from speechquilt.text_to_token.generate import EngineConfig
from speechquilt.text_to_token.network import TextToTokenConfig
from speechquilt.types import Document, SpokenSpan
from tests import bulk_jobs
from tests.contracts import tiny_tokenizer

WORDS = ["the", "cat", "sat", "on", "mat", "where", "does", "anna", "live"]  # those that the tiny tokenizer knows
LLAMA = LlamaConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)


@pytest.fixture(scope="module")
def ear(tmp_path_factory) -> Path:
    """A speech tokenizer with random weights: it reads tokens back, and all wrong."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.build().save(folder)
    return folder


@pytest.fixture(scope="module")
def speaker(tmp_path_factory, ear) -> Path:
    """A text-to-token model with random weights: it babbles, each seed in its own way. Its words end soon."""
    folder = tmp_path_factory.mktemp("text_to_token")
    tokenizer = tiny_tokenizer.build()
    config = TextToTokenConfig(num_text=tokenizer.text_tokenizer.size, num_speech=tokenizer.vocab_size, llama=LLAMA)
    model = config.build(seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 3.0  # every hidden state has this direction,
        model.lm_head.weight[model.vocab.word_end, 0] += 0.9  # and it says: end of the word
    network.save(folder, model, tokenizer.text_tokenizer, tokenizer.fingerprint)
    return folder


def prose(num_words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, num_words).tolist())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Twelve documents in five formats; two rows are broken."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text(prose(60, 0))
    (folder / "b.md").write_text("\n\n".join(prose(40, i) for i in range(1, 4)) + "\n")
    lines = [json.dumps({"id": f"line{i}", "text": prose(30 + i, i)}) for i in range(4, 8)]
    (folder / "c.jsonl").write_text("\n".join([*lines[:2], "not json", *lines[2:]]))
    table = pa.table({"text": [prose(35, i) for i in range(8, 12)] + [None], "url": ["u"] * 5})
    pq.write_table(table, folder / "d.parquet", row_group_size=2)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file of the finished shards and its digest; what the job keeps for itself aside."""
    files = (p for p in folder.iterdir() if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


KEYWORDS = {"workers": 1, "slice_bytes": 400, "passes": 2, "max_reject_ratio": 0.5}


def plain(document: Document) -> tuple:
    """A document as data that can be compared."""
    segments = [
        (s.modality, s.ids_T.tolist(), None if s.unit_end_T is None else s.unit_end_T.tolist())
        for s in document.segments
    ]
    return document.id, document.source, segments


def test_documents_are_those_of_one_span_at_a_time(corpus, speaker, tmp_path):
    """The plain rule: plan a document, speak each span alone under its own seed, assemble."""
    bulk_jobs.interleave(str(corpus), tmp_path / "bulk", speaker, temperature=0.5, **KEYWORDS)
    found = {d.id: plain(d) for d in read_documents(tmp_path / "bulk")}
    assert len(found) == 2 * 10
    loaded = network.load(speaker)
    engine = EngineConfig(temperature=0.5).build(loaded.model, loaded.tokenizer)
    for id, text in {"a.txt": prose(60, 0), "line5": prose(35, 5), "d.parquet:1": prose(35, 9)}.items():
        for number in (0, 1):
            plan = synthetic.plan(id, text, number, InterleaveConfig())
            spans = [engine.generate([span], [plan.seed + i])[0] for i, span in enumerate(plan.spoken_spans)]
            assert spans
            expected = synthetic.assemble(plan, spans, loaded.tokenizer.encode_run)
            assert found[f"{id}/pass{number}"] == plain(expected)


def test_two_workers_and_any_slices_give_the_same_documents(corpus, speaker, tmp_path):
    bulk_jobs.interleave(str(corpus), tmp_path / "1", speaker, **KEYWORDS)
    bulk_jobs.interleave(str(corpus), tmp_path / "2", speaker, **{**KEYWORDS, "workers": 2})
    bulk_jobs.interleave(
        str(corpus), tmp_path / "3", speaker, **{**KEYWORDS, "slice_bytes": 10**6, "slices_per_shard": 3}
    )
    assert content(tmp_path / "1") == content(tmp_path / "2")
    documents = [sorted(plain(d) for d in read_documents(tmp_path / name)) for name in "13"]
    assert documents[0] == documents[1]
    assert len({id for id, _, _ in documents[0]}) == len(documents[0])


def test_killed_commands_go_on_to_the_same_bytes(corpus, speaker, ear, tmp_path):
    """SIGKILL of the whole command three times, each when some more tasks are done and the next is at a random point."""
    rng = np.random.default_rng(0)
    keywords = {**KEYWORDS, "tokenizer": ear, "noise_sample": 0.5}
    bulk_jobs.interleave(str(corpus), tmp_path / "whole", speaker, **keywords)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["speechquilt.jobs.interleave_text", "hypothesis", "pytest"])
    killed = tmp_path / "killed"
    parts = "job/parts/??????"
    for round in range(3):
        child = processes.Process(target=bulk_jobs.interleave, args=(str(corpus), killed, speaker), kwargs=keywords)
        child.start()
        while child.is_alive() and len(list(killed.glob(parts))) < 3 * round + 2:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert 0 < len(list(killed.glob(parts))) < 18
    bulk_jobs.interleave(str(corpus), killed, speaker, **keywords)
    assert content(killed) == content(tmp_path / "whole")
    assert {"stats.json", "shard_stats.jsonl", "shards.json", "rejects.jsonl"} < set(content(killed))


def test_a_killed_worker_is_named_and_its_task_done_again(corpus, speaker, tmp_path):
    """One of two workers dies by SIGKILL in the middle; the command says so and the next one finishes."""
    bulk_jobs.interleave(str(corpus), tmp_path / "whole", speaker, **KEYWORDS)
    killed = tmp_path / "killed"
    hunter = threading.Thread(target=kill_a_child, args=(killed,))
    hunter.start()
    with pytest.raises(ChildProcessError, match="run the same command again"):
        bulk_jobs.interleave(str(corpus), killed, speaker, **{**KEYWORDS, "workers": 2})
    hunter.join()
    assert not (killed / "shards.json").exists()
    bulk_jobs.interleave(str(corpus), killed, speaker, **KEYWORDS)
    assert content(killed) == content(tmp_path / "whole")


def kill_a_child(folder: Path) -> None:
    """SIGKILL to the first process of the pool, once a task is done."""
    while not list(folder.glob("job/parts/??????")):
        time.sleep(0.002)
    workers = [p for p in multiprocessing.active_children() if "SpawnProcess" in p.name]
    os.kill(workers[0].pid, signal.SIGKILL)


def test_what_the_shards_say_of_themselves(corpus, speaker, ear, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "FORECAST_AFTER_S", 0.0)
    out = tmp_path / "out"
    command = ["interleave", str(corpus), str(out), "--text-to-token", str(speaker), "--workers", "1"]
    command += ["--tokenizer", str(ear), "--noise-sample", "0", "--slice-mib", "0.001", "--max-reject-ratio", "0.5"]
    command += ["--temperature", "0.4"]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    assert told.err.count("expected in all") + told.out.count("expected in all") == 1
    shards = ShardFolder(out)
    stats = json.loads((out / bulk.STATS).read_text())
    documents = [shards[i] for i in range(len(shards))]
    speech = [s for d in documents for s in d.segments if s.modality == "speech"]
    made_by = shards.info.made_by
    assert made_by["text_to_token"] == recipe.model_fingerprint(speaker)
    assert (made_by["ratio"], made_by["seed"], made_by["poisson_mean"], made_by["passes"]) == (0.3, 0, 10.0, 1)
    assert made_by["engine"]["temperature"] == 0.4
    assert shards.info.speech_fingerprint == tiny_tokenizer.build().fingerprint
    assert stats["words"] == sum(len(split_words(shards.text(i))) for i in range(len(shards)))
    assert stats["spans"] - sum(stats["rejects"].values()) == len(speech)
    assert stats["ratio"] == stats["spoken_words"] / stats["words"]
    # Where no share is asked for, a few of each shard are read back all the same.
    lines = [json.loads(line) for line in (out / bulk.SHARD_STATS).read_text().splitlines()]
    files = {s["file"] for s in shards.manifest["shards"]}
    assert [line["shard"] in files for line in lines] == [
        line["words"] > 0 for line in lines
    ]  # one holds rejects alone
    read_back = [sum(kind["spans"] for kind in line["noise"].values()) for line in lines]
    assert read_back == [min(recipe.NOISE_AT_LEAST, line["spans"] - sum(line["rejects"].values())) for line in lines]
    assert stats["noise_rates"]["all"]["wer"] > 0.5  # of a tokenizer that never learned to read
    assert shards.manifest["rejects"] == {"not JSON": 1, "empty text": 1}
    for part in ("rejected documents     2: 1 ", "noise, all", f"speechquilt inspect {out}"):
        assert part in told.out


class Listener:
    """A `noise.TokenReader` that hears nothing and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def read_back(self, tokens):
        self.given += [int(ids_T[0]) for ids_T in tokens]
        return [""] * len(tokens)


@settings(max_examples=20, deadline=None)
@given(num_documents=st.integers(1, 30), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_the_noise_sample_is_drawn_by_the_spans_alone(num_documents, share):
    """The same spans whatever went before; at least a few; about the share that was asked for."""

    def sample(skip: int) -> list[int]:
        ear = Listener()
        taken = recipe.NoiseSample(NoiseMeter(ear), share, tiny_tokenizer.TEXT.encode)
        for number in range(skip, num_documents):
            plan = synthetic.plan(f"d{number}", prose(200, number), 0, InterleaveConfig())
            lengths = [2 * len(tiny_tokenizer.TEXT.encode(span)) for span in plan.spoken_spans]
            ids = [np.full(length, 1 + 1000 * number + k) for k, length in enumerate(lengths)]
            good = [SpokenSpan(ids_T=ids_T, unit_end_T=ids_T) for ids_T in ids]
            bad = [SpokenSpan(ids_T=ids_T[:0], unit_end_T=ids_T[:0]) for ids_T in ids]
            total[number] = len(good)
            taken.add(plan, good)
            taken.add(plan, bad)  # no speech: they stay text and are not read
        counts = taken.counts()
        assert sum(kind["spans"] for kind in counts.values()) == len(ear.given) - 1
        return sorted(ear.given[1:])  # the first is the meter's own trial

    total: dict[int, int] = {}
    whole = sample(0)
    assert sample(0) == whole
    assert len(set(whole)) == len(whole) >= min(recipe.NOISE_AT_LEAST, sum(total.values()))
    spread = 4 * (sum(total.values()) * share * (1 - share)) ** 0.5
    assert abs(len(whole) - share * sum(total.values())) <= max(recipe.NOISE_AT_LEAST, spread)
    rest = sample(num_documents // 2)
    if len(rest) > recipe.NOISE_AT_LEAST:  # by their share, not as the least that is taken
        assert set(rest) <= set(whole)


def test_a_second_call_does_nothing_and_other_settings_are_refused(corpus, speaker, tmp_path, capsys):
    command = ["interleave", str(corpus / "a.txt"), str(tmp_path / "out"), "--text-to-token", str(speaker)]
    assert cli.main(command) == 0
    before = content(tmp_path / "out")
    left_over = tmp_path / "out" / "job" / "parts" / "000000"
    left_over.mkdir(parents=True)  # a kill just before the merge would have removed it
    assert cli.main(command) == 0
    assert [p.name for p in (tmp_path / "out" / "job").iterdir()] == ["job.json"]
    assert "complete, skipped" in capsys.readouterr().out
    for change in (["--seed", "1"], ["--ratio", "0.2"], ["--passes", "2"], ["--max-words", "9"], ["--top-p", "1"]):
        assert cli.main([*command, *change]) == 2
        assert "begun with other settings or inputs" in capsys.readouterr().err
    assert content(tmp_path / "out") == before


def test_mistakes_are_named(corpus, speaker, ear, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_tokenizer.build(codebook_size=20).save(other)
    command = ["interleave", str(corpus), str(tmp_path / "out"), "--text-to-token", str(speaker), "--workers", "1"]
    cases = [
        (["--passes", "0"], "passes=0 must be at least 1"),
        (["--max-words", "0"], "max_words=0 must be at least 1"),
        (["--slice-mib", "0"], "slice_bytes=0 must be at least 1"),
        (["--noise-sample", "2"], "noise_sample=2.0 must be between 0 and 1"),
        (["--text-column", "body"], "has no column 'body', only text, url"),
        (["--tokenizer", str(other)], "give the speech tokenizer that it was trained for"),
        (["--device", "cuda"], "device='cuda' must be"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0 (greedy) or more"),
        (["--rows", "0"], "rows=0 must be at least 1"),
        (["--workers", "0"], "workers=0 must be at least 1"),
        ([], "2 of 12 items were rejected (16.7%), above max_reject_ratio=0.1"),
    ]
    for extra, message in cases:
        assert cli.main(command + extra) == 2
        assert message in capsys.readouterr().err


def test_shards_are_not_made_inside_the_corpus(tmp_path, speaker, capsys):
    """They are Parquet with a column `text`: the second call would read them as a part of the corpus."""
    (tmp_path / "a.txt").write_text(prose(30, 0))
    (tmp_path / "link").symlink_to(tmp_path)
    for inside in (tmp_path / "out", tmp_path, tmp_path / "link" / "out"):
        assert cli.main(["interleave", str(tmp_path), str(inside), "--text-to-token", str(speaker)]) == 2
        assert "lies inside the corpus" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "link"]
    beside = ["interleave", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--text-to-token", str(speaker)]
    assert cli.main(beside) == 0


def test_a_merge_that_dies_anywhere_can_be_repeated(corpus, speaker, tmp_path, monkeypatch):
    keywords = {**KEYWORDS, "passes": 1}
    with pytest.raises(ValueError, match="above max_reject_ratio=0"):
        bulk_jobs.interleave(str(corpus), tmp_path / "done", speaker, **{**keywords, "max_reject_ratio": 0})
    shutil.copytree(tmp_path / "done", tmp_path / "whole")
    bulk_jobs.interleave(str(corpus), tmp_path / "whole", speaker, **keywords)
    real, calls = os.replace, [0, 0]  # calls seen, the one that is not survived

    def replace(*paths):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise KeyboardInterrupt
        real(*paths)

    died = True
    while died:
        calls[:] = 0, calls[1] + 1
        folder = tmp_path / str(calls[1])
        shutil.copytree(tmp_path / "done", folder)
        monkeypatch.setattr(os, "replace", replace)
        try:
            bulk_jobs.interleave(str(corpus), folder, speaker, **keywords)
            died = False
        except KeyboardInterrupt:
            bulk_jobs.interleave(str(corpus), folder, speaker, **keywords)
        monkeypatch.undo()
        assert content(folder) == content(tmp_path / "whole")
    assert calls[1] > len(content(tmp_path / "whole"))  # every file, and what the job notes
