"""Bulk jobs on Slurm or Ray through datatrove: one datatrove task per task of the job, then one that merges.

Importing this module needs datatrove.
Trap: datatrove marks finished tasks in its own logs and `bulk` by the task's folder. Both are asked before work is done, so
the job's folder and the logs in it belong together: delete both or neither.
"""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch

from speechquilt import config
from speechquilt.jobs import bulk
from speechquilt.jobs.bulk import JOB_FOLDER, Job, TaskFunction

try:
    from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError("datatrove is not installed; run `pip install speechquilt[cluster]`") from error

EXECUTORS = {"slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
REQUIRED = {"slurm": ["time", "partition"], "ray": []}
_OURS = {"pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed", "job_name"}


class TaskStep(PipelineStep):
    """Rank r does task r of the job."""

    name, type = "bulk task", "speechquilt"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self._function: TaskFunction | None = None

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        torch.set_num_threads(1)  # the same bits as in a local worker
        if self._function is None:
            self._function = self.job.work.open(rank)
        bulk.run_task(self.job, self._function, rank)
        return data


class MergeStep(PipelineStep):
    """Makes the shard folders when every task is done."""

    name, type = "bulk merge", "speechquilt"

    def __init__(self, job: Job, max_reject_ratio: float) -> None:
        super().__init__()
        self.job, self.max_reject_ratio = job, max_reject_ratio

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        bulk.merge(self.job, self.max_reject_ratio)
        return data


def run_on_cluster(
    job: Job, executor: str, workers: int | None, settings: Mapping[str, str], max_reject_ratio: float
) -> dict[str, int] | None:
    """Run the job there and return its counts; None when it was handed to a queue that works on it later.

    `settings`: of datatrove's executor, for example partition=gpu time=24:00:00 gpus_per_task=1. Raises ValueError when one
    is unknown or missing.
    """
    keywords = _keywords(executor, settings)
    logs = job.folder / JOB_FOLDER
    build = EXECUTORS[executor]
    name = {"job_name": f"speechquilt-{job.folder.name}"} if executor == "slurm" else {}
    tasks = build(
        pipeline=[TaskStep(job)],
        tasks=job.num_tasks,
        workers=workers or -1,
        logging_dir=str(logs / "task_logs"),
        **name,
        **keywords,
    )
    if executor != "slurm":
        tasks.run()
        return bulk.merge(job, max_reject_ratio)
    merging = build(
        pipeline=[MergeStep(job, max_reject_ratio)],
        tasks=1,
        logging_dir=str(logs / "merge_logs"),
        depends=tasks,
        **name,
        **{key: value for key, value in keywords.items() if key != "gpus_per_task"},
    )
    merging.run()
    return None


def _keywords(executor: str, settings: Mapping[str, str]) -> dict[str, Any]:
    known = set(inspect.signature(EXECUTORS[executor].__init__).parameters) - _OURS - {"self"}
    for key in settings:
        if key not in known:
            raise ValueError(
                f"{key!r} is no setting of datatrove's {executor} executor; {config.nearest(key, sorted(known))}"
            )
    keywords = {key: _value(value) for key, value in settings.items()}
    if missing := [key for key in REQUIRED[executor] if key not in keywords]:
        raise ValueError(f"the {executor} executor needs {missing[0]}; add --cluster {missing[0]}=...")
    return keywords


def _value(text: str) -> Any:
    """JSON, or the text itself: 8, true, {"account": "speech"}, 24:00:00."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
