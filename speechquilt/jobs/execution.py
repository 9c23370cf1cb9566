"""Run a prepared bulk job: here in processes, or on a cluster, or not at all because it is complete.

Trap: on Slurm the job only begins here; its counts are known when the queue is through with it.
"""

from dataclasses import dataclass, field
from typing import Literal

from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import Job


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and by how many the tasks of a job are done. None of it changes what comes out."""

    workers: int | None = None
    """Processes; none: one for each GPU, else one for each core that this process may use."""
    max_reject_ratio: float = 0.1
    """Fail when a larger share of the input had to be rejected, 0 to 1."""
    executor: Literal["local", "slurm", "ray"] = "local"
    """Where the tasks run; slurm and ray go through datatrove."""
    cluster: dict[str, str] = field(default_factory=dict)
    """Settings of datatrove's executor, for example partition=gpu time=24:00:00."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1; leave it out for one per GPU or core")
        if not 0 <= self.max_reject_ratio <= 1:
            raise ValueError(f"max_reject_ratio={self.max_reject_ratio} must be between 0 and 1")

    def run(self, job: Job, default_workers: int) -> dict[str, int] | None:
        """-> what `bulk.merge` counted, None when a queue works on it. Raises what the executor and `bulk.merge` raise."""
        if bulk.counts_of(job.folder) is not None:
            print(f"[{job.folder}] complete, skipped")
            return bulk.merge(job, self.max_reject_ratio)
        if self.executor == "local":
            bulk.run_local(job, self.workers or default_workers)
            return bulk.merge(job, self.max_reject_ratio)
        from speechquilt.jobs.cluster import run_on_cluster  # datatrove is an extra

        return run_on_cluster(job, self.executor, self.workers, self.cluster, self.max_reject_ratio)
