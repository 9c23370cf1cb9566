"""Bulk work: whatever is killed, and however many work, the shards are those of one undisturbed run."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechquilt.data.shards.documents import ShardFolder, ShardWriter, read_documents
from speechquilt.data.shards.parquet import MANIFEST, ShardInfo
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Output
from speechquilt.types import Document, Segment

INFO = ShardInfo(num_text=0, num_speech=100, text_fingerprint="", speech_fingerprint="x", made_by={"stage": "test"})
OUTPUTS = {name: Output(writer=ShardWriter, info=INFO) for name in ("speech", "even", "never")}


@dataclass(frozen=True, kw_only=True)
class Count:
    """Item n becomes n tokens; multiples of 10 are rejected, even ones go to a second output too.

    `log`: a line is added for each task that is begun; `pause_s` makes items slow enough to be killed in the middle.
    """

    log: str = ""
    pause_s: float = 0.0
    fail_at: int = -1
    unit: str = "tokens"

    def open(self, worker: int):
        return self

    def __call__(self, items, out):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{items[0]['n']}\n")
        for item in items:
            n = item["n"]
            if n == self.fail_at:
                raise ValueError(f"item {n} is a bug")
            time.sleep(self.pause_s)
            if n % 10 == 0:
                out.reject(f"i{n}", "a multiple of ten")
            else:
                ids_T = (np.arange(n) % 100).astype(np.int32)
                document = Document(id=f"i{n}", source="t", segments=(Segment(modality="speech", ids_T=ids_T),))
                out.write("speech", document, str(n))
                if n % 2 == 0:
                    out.write("even", document, str(n))
            out.tell(1, float(n))


def prepare(folder: Path, num_items: int = 23, per_task: int = 4, work: Count | None = None) -> bulk.Job:
    items = [{"n": n} for n in range(1, num_items + 1)]
    return bulk.prepare(folder, work or Count(), {"v": 1}, OUTPUTS, items, items_per_task=per_task)


def content(folder: Path) -> dict[str, str]:
    """Every file of the finished job and its digest."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@settings(max_examples=10, deadline=None)
@given(num_items=st.integers(1, 40), per_task=st.integers(1, 12), data=st.data())
def test_every_item_comes_out_once_and_readers_accept_the_folder(tmp_path_factory, num_items, per_task, data):
    folder = tmp_path_factory.mktemp("bulk")
    job = prepare(folder, num_items, per_task)
    order = data.draw(st.permutations(range(job.num_tasks)))
    for number in order:  # any order, as on a cluster
        bulk.run_task(job, job.work.open(0), number)
    if num_items == 0 or all(n % 10 == 0 for n in range(1, num_items + 1)):
        return
    counts = bulk.merge(job, max_reject_ratio=1.0)
    read = list(read_documents(folder / "speech"))
    assert [d.id for d in read] == [f"i{n}" for n in range(1, num_items + 1) if n % 10]
    assert counts["rejects"] == num_items // 10
    rejects = [json.loads(line) for line in (folder / "speech" / "rejects.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rejects] == [f"i{n}" for n in range(10, num_items + 1, 10)]
    shards = ShardFolder(folder / "speech")
    assert shards.manifest["tokens"] == {"speech": sum(len(d.segments[0].ids_T) for d in read)}
    assert [shards.text(i) for i in range(len(shards))] == [d.id[1:] for d in read]
    assert not (folder / "never").exists()
    assert not list(folder.rglob("*.tmp"))


def test_one_worker_and_two_give_the_same_bytes(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        job = prepare(tmp_path / name)
        bulk.run_local(job, workers)
        bulk.merge(job)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def work_alone(folder: Path, log: Path, pause_s: float) -> None:
    job = prepare(folder, work=Count(log=str(log), pause_s=pause_s))
    bulk.run_local(job, 1)
    bulk.merge(job)


@pytest.fixture(scope="module")
def processes():
    """Processes that begin at once: their server has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["speechquilt.jobs.bulk", "hypothesis", "pytest"])
    return context


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_points_lose_and_double_nothing(tmp_path, seed, processes):
    rng = np.random.default_rng(seed)
    job = prepare(tmp_path / "whole")
    bulk.run_local(job, 1)
    bulk.merge(job)
    killed, log = tmp_path / "killed", tmp_path / "log"
    log.touch()
    for _ in range(5):
        before = log.stat().st_size
        child = processes.Process(target=work_alone, args=(killed, log, 0.005))
        child.start()
        while child.is_alive() and log.stat().st_size == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        child.kill()
        child.join()
    finished = job.num_tasks - len(prepare(killed).unfinished())
    log.write_text("")
    last = processes.Process(target=work_alone, args=(killed, log, 0.0))
    last.start()
    last.join()
    assert last.exitcode == 0
    assert len(log.read_text().split()) == job.num_tasks - finished  # finished tasks were left alone
    assert content(killed) == content(tmp_path / "whole")


def test_half_a_file_of_a_killed_merge_does_not_stay(tmp_path):
    job = prepare(tmp_path / "killed")
    bulk.run_local(job, 1)
    left = [job.folder / name / "rejects.jsonl.0.tmp" for name in ("job", *job.outputs)]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    bulk.merge(job)
    assert not any(path.exists() for path in left)


def test_a_killed_worker_is_reported_and_its_task_done_again(tmp_path):
    """The worker dies in the middle of a task, not the command."""
    job = prepare(tmp_path / "whole")
    bulk.run_local(job, 1)
    bulk.merge(job)
    job = prepare(tmp_path / "killed", work=Suicide(flag=str(tmp_path / "flag")))
    with pytest.raises(ChildProcessError, match="run the same command again"):
        bulk.run_local(job, 2)
    assert job.unfinished()
    bulk.run_local(job, 1)
    bulk.merge(job)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@dataclass(frozen=True, kw_only=True)
class Suicide(Count):
    """Kills its own process in its third task, once."""

    flag: str = ""

    def __call__(self, items, out):
        if items[0]["n"] == 9 and not Path(self.flag).exists():
            Path(self.flag).touch()
            out.write("speech", Document(id="half", source="t", segments=()))
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(items, out)


@pytest.mark.parametrize("die_at", range(12))
def test_a_merge_that_dies_anywhere_can_be_repeated(tmp_path, die_at, monkeypatch):
    job = prepare(tmp_path / "whole")
    bulk.run_local(job, 1)
    bulk.merge(job)
    job = prepare(tmp_path / "killed")
    bulk.run_local(job, 1)
    calls = Counter()
    real = os.replace

    def replace(*paths):
        calls["n"] += 1
        if calls["n"] == die_at:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    try:
        bulk.merge(job)
    except KeyboardInterrupt:
        assert not (tmp_path / "killed" / "even" / MANIFEST).is_file() or die_at > 8
    bulk.merge(prepare(tmp_path / "killed"))
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_second_worker_on_the_same_task_changes_nothing(tmp_path):
    """An orphan of a killed command may still be at work."""
    job = prepare(tmp_path / "job")
    bulk.run_task(job, job.work.open(0), 0)
    before = content(tmp_path / "job")

    def beside(items, out):
        job.work.open(0)(items, out)
        bulk.run_task(job, job.work.open(0), 1)  # the other is faster

    bulk.run_task(job, beside, 1)
    after = content(tmp_path / "job")
    assert before.items() <= after.items()
    assert not list((tmp_path / "job").rglob("*.tmp"))


def test_a_task_that_raises_leaves_nothing_and_stops_the_job(tmp_path):
    job = prepare(tmp_path, work=Count(fail_at=7))
    for workers in (1, 2):
        with pytest.raises(ValueError, match="item 7 is a bug"):
            bulk.run_local(job, workers)
        assert 1 in job.unfinished()
        with pytest.raises(ValueError, match="tasks are not done"):
            bulk.merge(job)


def test_rejects_above_the_limit_keep_the_work(tmp_path):
    log = tmp_path / "log"
    job = prepare(tmp_path / "job", work=Count(log=str(log)))
    bulk.run_local(job, 1)
    with pytest.raises(ValueError, match=r"2 of 23 items were rejected \(8.7%\), above max_reject_ratio=0.01"):
        bulk.merge(job, 0.01)
    begun = log.read_text()
    bulk.run_local(job, 1)
    assert bulk.merge(job, 0.1)["speech"] == 21
    assert log.read_text() == begun


def test_other_inputs_or_settings_are_refused(tmp_path):
    job = prepare(tmp_path / "job")
    with pytest.raises(ValueError, match="begun with other settings or inputs"):
        prepare(tmp_path / "job", num_items=24)
    with pytest.raises(ValueError, match="begun with other settings or inputs"):
        prepare(tmp_path / "job", per_task=5)
    bulk.run_local(job, 1)
    bulk.merge(job)
    again = prepare(tmp_path / "job")
    assert again.unfinished() == []
    assert bulk.merge(again) == bulk.counts_of(tmp_path / "job")
    with pytest.raises(ValueError, match="begun with other settings or inputs"):
        prepare(tmp_path / "job", num_items=24)
    with pytest.raises(ValueError, match="there is nothing to do"):
        prepare(tmp_path / "empty", num_items=0)
    with ShardWriter(tmp_path / "foreign" / "speech", INFO):
        pass
    with pytest.raises(FileExistsError, match="finished shards of another command"):
        prepare(tmp_path / "foreign")


def test_a_damaged_part_is_named(tmp_path):
    job = prepare(tmp_path / "job")
    bulk.run_local(job, 1)
    (shard,) = (job.part(2) / "speech").glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"has not the .* bytes that its task wrote"):
        bulk.merge(job)


def test_through_datatrove(tmp_path):
    """The same tasks as steps of a datatrove pipeline, in its own processes."""
    pytest.importorskip("datatrove", reason="datatrove is the extra `cluster`")
    from datatrove.executor import LocalPipelineExecutor

    from speechquilt.jobs.cluster import MergeStep, TaskStep

    job = prepare(tmp_path / "local")
    bulk.run_local(job, 1)
    bulk.merge(job)
    job = prepare(tmp_path / "datatrove")
    logs = str(tmp_path / "logs")
    LocalPipelineExecutor([TaskStep(job)], tasks=job.num_tasks, workers=2, logging_dir=logs, start_method="spawn").run()
    LocalPipelineExecutor([MergeStep(job, 0.1)], tasks=1, workers=1, logging_dir=f"{logs}/merge").run()
    assert content(tmp_path / "datatrove") == content(tmp_path / "local")
