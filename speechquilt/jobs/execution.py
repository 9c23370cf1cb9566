"""Run a prepared bulk job: here in processes, or on a cluster, or not at all because it is complete.

Place in the pipeline: layer 4, the last step of every command that makes shards in bulk.
Trap: on Slurm the job only begins here; its counts are known when the queue is through with it.
"""

from collections.abc import Sequence
from typing import Literal

from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Job

Executor = Literal["local", "slurm", "ray"]


def run(
    job: Job,
    executor: Executor,
    workers: int | None,
    cluster: Sequence[str],
    max_reject_ratio: float,
    default_workers: int,
) -> dict[str, int] | None:
    """-> what `bulk.merge` counted, None when a queue works on it. Raises what the executor and `bulk.merge` raise.

    `cluster`: key=value settings of datatrove's executor; `default_workers`: local processes when `workers` is None.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    if bulk.counts_of(job.folder) is not None:
        print(f"[{job.folder}] complete, skipped")
        return bulk.merge(job, max_reject_ratio)
    if executor == "local":
        bulk.run_local(job, default_workers if workers is None else workers)
        return bulk.merge(job, max_reject_ratio)
    from speechquilt.jobs.cluster import run_on  # datatrove is an extra

    return run_on(job, executor, workers, cluster, max_reject_ratio)
