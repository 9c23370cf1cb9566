"""Independent jobs side by side in processes of one thread each.

Small models waste most of a second thread, so two processes of one thread finish far more than one process of two; and
one thread gives the same bits on any number of cores.
Trap: a worker must not outlive its parent, or two processes would write one run folder after a kill and a restart.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


def num_workers(num_jobs: int) -> int:
    """As many jobs at once as cores this process may use; one on a GPU, which they would have to share."""
    return 1 if torch.cuda.is_available() else max(1, min(num_jobs, len(os.sched_getaffinity(0))))


def run_all(function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
    """`function(*job)` for every job, results in order. The first exception ends the others that have not begun and is
    raised. `function` must be importable; arguments, results and exceptions travel pickled between our own processes.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers(len(jobs)), mp_context=context, initializer=_begin) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def end_with_parent() -> None:
    """End this process when the one that spawned it ends, however that happens."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a spawned process has one
    parent.join()
    os._exit(1)


def _begin() -> None:
    torch.set_num_threads(1)
    end_with_parent()
