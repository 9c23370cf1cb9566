"""Corpus-scale work as independent tasks: each turns a slice of the input list into one shard per output.

The task function comes with the job; processes here or a cluster call it. A task's folder is itself a finished `shards` folder, so one writer and one reader serve both.
Trap: a task must be a pure function of its items. A killed task is done again from nothing, on any worker, beside any
other; its folder appears under its number in one rename, and whoever comes second throws its own copy away.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from speechquilt import config
from speechquilt.counts import Counts, add_counts
from speechquilt.data.shards.parquet import MANIFEST, REJECTS, ItemWriter, ShardInfo, is_complete
from speechquilt.files import replacing, write_json
from speechquilt.jobs.progress import LOOK_EVERY_S, Progress
from speechquilt.stages.workers import end_with_parent
from speechquilt.types import Row

JOB_FOLDER = "job"
STATS, SHARD_STATS = "stats.json", "shard_stats.jsonl"
_JOB, _ITEMS, _PARTS = "job.json", "items.parquet", "parts"

TaskFunction = Callable[[Sequence[Row], "TaskWriter"], None]
Tell = Callable[[float, float], None]  # (items done, or the part of one, and the amount of work in them)


@dataclass(frozen=True, kw_only=True)
class Output:
    """One folder of shards that a job makes: what writes it, and what its ids mean."""

    writer: type[ItemWriter]
    info: ShardInfo


class Work(Protocol):
    """What a recipe wants done. It travels pickled to the workers, so it is plain settings; models are loaded by `open`."""

    @property
    def unit(self) -> str:
        """What `TaskWriter.tell` counts besides items, for the progress line: "s audio"."""
        ...

    def open(self, worker: int) -> TaskFunction:
        """Called once in each process (`worker` counts those of this machine from 0) -> the function that does tasks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prepared job. `outputs` by the name of their folder ("." is the job's own); the first takes the rejects and is made
    even when empty. `summarise`: what `TaskWriter.count` was given by all tasks, added up -> what `stats.json` says.
    """

    folder: Path
    work: Work
    outputs: Mapping[str, Output]
    num_items: int
    items_per_task: int
    summarise: Callable[[Counts], Counts] = dict

    @property
    def num_tasks(self) -> int:
        return -(-self.num_items // self.items_per_task)

    def part(self, number: int) -> Path:
        """The folder of a finished task."""
        return self.folder / JOB_FOLDER / _PARTS / f"{number:06d}"

    def unfinished(self) -> list[int]:
        """Tasks that are still to be done, in order."""
        if counts_of(self.folder) is not None:
            return []
        return [number for number in range(self.num_tasks) if not self.part(number).is_dir()]

    def items(self, number: int) -> list[Row]:
        """The slice of the input list that task `number` works on."""
        file = pq.ParquetFile(self.folder / JOB_FOLDER / _ITEMS)
        return [json.loads(row) for row in file.read_row_group(number)["item"].to_pylist()]


class TaskWriter:
    """What a task function writes to: items, rejects, and how far it is. Use it in a `with` block."""

    def __init__(self, folder: Path, outputs: Mapping[str, Output], tell: Tell) -> None:
        self.folder, self.outputs, self.tell = folder, outputs, tell
        self._open: dict[str, ItemWriter] = {}
        self._counts: Counts = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TaskWriter":
        self._writer(next(iter(self.outputs)))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        if self._counts and exception[0] is None:
            write_json(self.folder / STATS, self._counts)

    def count(self, counts: Counts) -> None:
        """Add to what the shards' `stats.json` will say of all tasks; whole numbers, so that order does not matter."""
        self._counts = add_counts(self._counts, counts)

    def write(self, output: str, item: Any, text: str = "") -> None:
        """Add one item to the output of this name, with the text behind it."""
        self._writer(output).write(item, text)

    def reject(self, id: str, reason: str, detail: str = "") -> None:
        """Note an item of the input that became nothing, or less than it might; `reason` is a short class of fault, it is counted, and
        `detail` says what is wrong where, and how to mend it."""
        self._writer(next(iter(self.outputs))).reject(id, reason, detail)

    def _writer(self, name: str) -> ItemWriter:
        if name not in self._open:
            output = self.outputs[name]
            # One shard per task, and the job as a whole counts the rejects.
            writer = output.writer(
                self.folder / name, output.info, documents_per_shard=sys.maxsize, max_reject_ratio=1.0
            )
            self._open[name] = self._stack.enter_context(writer)
        return self._open[name]


def prepare(
    folder: Path,
    work: Work,
    settings: Any,
    outputs: Mapping[str, Output],
    items: Iterable[Row],
    *,
    items_per_task: int,
    summarise: Callable[[Counts], Counts] = dict,
) -> Job:
    """Write the input list into `folder`, or check that it is the one the folder was begun with.

    `settings`: plain JSON data, whatever of `work` decides the outcome. Raises ValueError when the folder belongs to other
    settings or items, or when there are no items, FileExistsError when it holds shards of another command.
    """
    if items_per_task < 1:
        raise ValueError(f"items_per_task={items_per_task} must be at least 1")
    folder = Path(folder)
    job_folder = folder / JOB_FOLDER
    old = _read_job(folder)
    if old is None:
        _refuse_foreign_shards(folder, outputs)
    if counts_of(folder) is None:
        _make_folder(job_folder)
    temporary = job_folder / f"{_ITEMS}.{uuid.uuid4().hex}.tmp"
    try:
        num_items, digest = _write_items(temporary, items, items_per_task)
        infos = {name: [o.writer.kind.name, config.to_dict(o.info)] for name, o in outputs.items()}
        fingerprint = config.fingerprint([settings, infos, items_per_task, digest])
        if old is not None and old["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} was begun with other settings or inputs ({old['items']} items, fingerprint {old['fingerprint']}; "
                f"now {num_items} items, {fingerprint}); give another output folder, or delete this one to start again"
            )
        if old is None or "counts" not in old:
            os.replace(temporary, job_folder / _ITEMS)
    finally:
        temporary.unlink(missing_ok=True)
    if old is None:
        write_json(job_folder / _JOB, {"fingerprint": fingerprint, "items": num_items})
    return Job(
        folder=folder,
        work=work,
        outputs=outputs,
        num_items=num_items,
        items_per_task=items_per_task,
        summarise=summarise,
    )


def counts_of(folder: Path) -> dict[str, int] | None:
    """What `merge` returned when it finished this folder's job; None when something is left to do."""
    return (_read_job(Path(folder)) or {}).get("counts")


def run_task(job: Job, function: TaskFunction, number: int, tell: Tell = lambda items, amount: None) -> None:
    """Do task `number` unless it is done. Its folder appears whole or not at all."""
    done = job.part(number)
    if done.is_dir():
        return
    temporary = done.with_name(f"{done.name}.{uuid.uuid4().hex}.tmp")
    try:
        with TaskWriter(temporary, job.outputs, tell) as writer:
            function(job.items(number), writer)
        os.rename(temporary, done)
    except OSError:
        if not done.is_dir():  # else another worker was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run_local(job: Job, workers: int) -> None:
    """Do all unfinished tasks in `workers` processes of one thread each, with a progress line.

    One worker runs in this process. Raises what a task raised, ChildProcessError when a worker was killed. What is
    finished stays.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    numbers = job.unfinished()
    done = job.num_items - sum(_num_items(job, number) for number in numbers)
    with Progress(job.folder.name, job.work.unit, total=job.num_items, done=done) as progress:
        if workers == 1 or len(numbers) < 2:
            _run_here(job, numbers, progress)
        else:
            _run_pool(job, numbers, min(workers, len(numbers)), progress)


def merge(job: Job, max_reject_ratio: float = 0.1) -> dict[str, int]:
    """All tasks are done -> finished shard folders; returns counts. May be repeated after a kill at any point.

    Raises ValueError when a task is missing or damaged, when nothing came out, or when rejects / (items of the first output
    + rejects) is above `max_reject_ratio`; the tasks stay, so a higher limit needs no work again.
    """
    if not 0 <= max_reject_ratio <= 1:
        raise ValueError(f"max_reject_ratio={max_reject_ratio} must be between 0 and 1")
    if counts := counts_of(job.folder):
        _remove_parts(job)  # of a merge that was killed after it had noted the counts
        return counts
    if missing := job.unfinished():
        raise ValueError(
            f"{len(missing)} of {job.num_tasks} tasks are not done (first {missing[0]}); run the command again"
        )
    primary = next(iter(job.outputs))
    manifests = {name: _manifests(job, name) for name in job.outputs}
    _check_rejects(job, manifests[primary], max_reject_ratio)
    _merge_stats(job)
    counts = {"rejects": sum(sum(m["rejects"].values()) for m in manifests[primary].values())}
    for name, parts in manifests.items():
        counts[name] = sum(m["documents"] for m in parts.values())
        if counts[name] or name == primary:
            _merge_output(job, name, parts)
    write_json(job.folder / JOB_FOLDER / _JOB, {**(_read_job(job.folder) or {}), "counts": counts})
    _remove_parts(job)
    return counts


def _write_items(path: Path, items: Iterable[Row], items_per_task: int) -> tuple[int, str]:
    """One row group per task, so that a task reads its own slice alone. -> number of items, digest of all."""
    digest, num_items = hashlib.sha256(), 0
    schema = pa.schema([pa.field("item", pa.string(), nullable=False)])
    with pq.ParquetWriter(path, schema) as writer:
        for rows in _chunks((json.dumps(item, ensure_ascii=False) for item in items), items_per_task):
            writer.write_table(pa.table({"item": rows}, schema=schema), row_group_size=items_per_task)
            num_items += len(rows)
            for row in rows:
                digest.update(row.encode() + b"\n")
    if not num_items:
        raise ValueError("there is nothing to do: the input list is empty; check the input path")
    return num_items, digest.hexdigest()


def _chunks(rows: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := [row for _, row in zip(range(size), rows)]:
        yield chunk


def _num_items(job: Job, number: int) -> int:
    return min(job.items_per_task, job.num_items - number * job.items_per_task)


def _run_here(job: Job, numbers: Sequence[int], progress: Progress) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits as in a worker
    try:
        function = job.work.open(0) if numbers else None
        for number in numbers:
            assert function is not None
            run_task(job, function, number, progress.add)
    finally:
        torch.set_num_threads(threads)


def _run_pool(job: Job, numbers: Sequence[int], workers: int, progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    # Each worker writes to its own two places and nobody else does: no lock that a killed worker could keep.
    counters = context.RawArray("d", 2 * workers)
    places = context.SimpleQueue()
    for worker in range(workers):
        places.put(worker)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=(job, counters, places))
    try:
        futures = {pool.submit(_run_in_worker, number) for number in numbers}
        while futures:
            finished, futures = wait(futures, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            progress.show(sum(counters[0::2]), sum(counters[1::2]))
            _raise_first(finished)
    finally:
        pool.shutdown(cancel_futures=True)


def _raise_first(futures: Iterable[Future]) -> None:
    for future in futures:
        try:
            future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed (out of memory, or by hand); finished tasks are kept, so run the same command "
                "again, with fewer workers when memory was short"
            ) from error


class _Worker:
    """One process of the pool: the model is loaded with the first task, whose future then carries what went wrong."""

    def __init__(self, job: Job, counters: Any, number: int) -> None:
        self.job, self.counters, self.number = job, counters, number

    @functools.cached_property
    def function(self) -> TaskFunction:
        return self.job.work.open(self.number)

    def tell(self, items: float, amount: float) -> None:
        self.counters[2 * self.number] += items
        self.counters[2 * self.number + 1] += amount


_worker: _Worker  # in a process of the pool


def _begin_worker(job: Job, counters: Any, places: Any) -> None:
    global _worker
    end_with_parent()
    torch.set_num_threads(1)
    _worker = _Worker(job, counters, places.get())


def _run_in_worker(number: int) -> None:
    run_task(_worker.job, _worker.function, number, _worker.tell)


def _manifests(job: Job, name: str) -> dict[int, dict[str, Any]]:
    """What each task wrote for this output, by task number; most tasks write to all outputs, some to fewer."""
    paths = ((number, job.part(number) / name / MANIFEST) for number in range(job.num_tasks))
    return {number: json.loads(path.read_text(encoding="utf-8")) for number, path in paths if path.is_file()}


def _check_rejects(job: Job, manifests: Mapping[int, dict[str, Any]], max_reject_ratio: float) -> None:
    reasons: Counter[str] = Counter()
    for manifest in manifests.values():
        reasons.update(manifest["rejects"])
    documents = sum(m["documents"] for m in manifests.values())
    rejected = sum(reasons.values())
    total = documents + rejected
    listed = (
        f"{dict(reasons.most_common(5))}{_first_detail(job, manifests)}; every one is listed in "
        f"{job.folder / JOB_FOLDER / _PARTS}/*/*/{REJECTS}"
    )
    if rejected and not documents:
        raise ValueError(f"all {rejected} of {total} items were rejected: {listed}")
    if rejected > max_reject_ratio * total:
        raise ValueError(
            f"{rejected} of {total} items were rejected ({rejected / total:.1%}), above max_reject_ratio={max_reject_ratio}: "
            f"{listed}; mend the input, or run again with a higher limit: no task is done twice"
        )


def _first_detail(job: Job, manifests: Mapping[int, dict[str, Any]]) -> str:
    """What the first reject says for people, where it says anything."""
    name = next(iter(job.outputs))
    number = next((number for number, manifest in manifests.items() if manifest["rejects"]), None)
    if number is None:
        return ""
    with (job.part(number) / name / REJECTS).open(encoding="utf-8") as file:
        detail = json.loads(file.readline()).get("detail")
    return f", the first: {detail}" if detail else ""


def _remove_parts(job: Job) -> None:
    shutil.rmtree(job.folder / JOB_FOLDER / _PARTS, ignore_errors=True)
    written_to = [job.folder / name for name in (JOB_FOLDER, *job.outputs)]  # where a kill may have left half a file
    for left in [job.folder / JOB_FOLDER / _ITEMS, *(path for folder in written_to for path in folder.glob("*.tmp"))]:
        left.unlink(missing_ok=True)


def _merge_output(job: Job, name: str, manifests: Mapping[int, dict[str, Any]]) -> None:
    """Move the shards of all tasks into one folder and write its manifest last."""
    folder = job.folder / name
    folder.mkdir(exist_ok=True)
    shards, tokens, rejects = [], Counter[str](), Counter[str]()
    with replacing(folder / REJECTS) as rejects_file:
        for number, manifest in manifests.items():
            part = job.part(number) / name
            rejects_file.write((part / REJECTS).read_bytes())
            tokens.update(manifest["tokens"])
            rejects.update(manifest["rejects"])
            for shard in manifest["shards"]:  # at most one
                target = folder / _shard_name(number)
                _move(job.part(number), part / shard["file"], target, shard["bytes"])
                shards.append({**shard, "file": target.name})
    merged = {
        **next(iter(manifests.values())),
        "documents": sum(m["documents"] for m in manifests.values()),
        "tokens": dict(tokens),
        "rejects": dict(rejects),
        "shards": shards,
    }
    write_json(folder / MANIFEST, merged)


def _merge_stats(job: Job) -> None:
    """The counts of every shard as a line, and of all together; tasks that counted nothing leave no trace."""
    paths = [(number, job.part(number) / STATS) for number in range(job.num_tasks)]
    paths = [(number, path) for number, path in paths if path.is_file()]
    if not paths:
        return
    total: Counts = {}
    with replacing(job.folder / SHARD_STATS) as lines:
        for number, path in paths:
            counts = json.loads(path.read_text(encoding="utf-8"))
            total = add_counts(total, counts)
            lines.write(json.dumps({"shard": _shard_name(number), **counts}).encode() + b"\n")
    write_json(job.folder / STATS, job.summarise(total))


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.parquet"


def _move(part: Path, source: Path, target: Path, num_bytes: int) -> None:
    """Rename; done already when an earlier merge was killed after it."""
    if source.is_file():
        os.replace(source, target)
    if not target.is_file() or target.stat().st_size != num_bytes:
        raise ValueError(
            f"{target} is missing or has not the {num_bytes} bytes that its task wrote; delete {part} "
            "and run the command again, which does that task once more"
        )


def _read_job(folder: Path) -> dict[str, Any] | None:
    path = folder / JOB_FOLDER / _JOB
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _refuse_foreign_shards(folder: Path, outputs: Mapping[str, Output]) -> None:
    for name in outputs:
        if is_complete(folder / name):
            raise FileExistsError(
                f"{folder / name} already holds finished shards of another command; delete it or give another output folder"
            )


def _make_folder(folder: Path) -> None:
    try:
        (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error}); choose a folder that you may write to") from error
