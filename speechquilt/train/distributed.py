"""Ranks: start under torchrun, add gradients and scalars over processes, say so when one of them is gone.

Trap: rank r reads rows r::world_size of the global batch, so sums over ranks are sums over that batch. Everything here
adds and never averages; the trainer divides once, by the weight of the whole batch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BUCKET_ELEMENTS = 16 * 1024 * 1024  # 64 MiB of fp32 gradients per all-reduce
# Gloo raises a plain RuntimeError whatever happened, so only the words of the message tell.
LOST_RANK = ("connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout")


def rank() -> int:
    """This process's number; 0 when there is only one. Known before `start` from torchrun's environment."""
    return dist.get_rank() if _started() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that train together; 1 outside torchrun."""
    return dist.get_world_size() if _started() else int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str, timeout_s: float = 600.0) -> torch.device:
    """Join the other processes of torchrun, if any, and return this process's device.

    `device` is "auto", "cpu", "cuda" or any name torch knows. NCCL on CUDA, gloo elsewhere; a rank that leaves the
    others without an answer for `timeout_s` seconds is an error. Raises ValueError on a name that torch does not know
    and on a CUDA device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} but torch sees no CUDA device; use device=cpu or device=auto")
    if device == "cuda":
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device torch knows; use auto, cpu or cuda") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size() > 1 and not _started():
        # Gloo beside NCCL, so that sending Python objects does not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return chosen


def stop() -> None:
    """Leave the group; a process that exits without it prints a warning under NCCL."""
    if _started():
        dist.destroy_process_group()


def new_cpu_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A second group of all ranks, on gloo, for a thread whose messages must not mix with another's; None when
    alone."""
    if world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turns what gloo and NCCL say when a rank is gone into what has happened and what to do."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if world_size() == 1 or not (isinstance(error, dist.DistError) or any(w in words for w in LOST_RANK)):
            raise
        raise RuntimeError(
            f"rank {rank()} got no answer from another rank, which died or hangs ({str(error)[:300]}); look for the first "
            "error in the output of the other ranks, then run the same command again to go on from the last checkpoint"
        ) from error


def sum_tensors(tensors: list[torch.Tensor]) -> None:
    """Add every tensor over the ranks, in place, flattened into few large messages."""
    if world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([x.reshape(-1) for x in bucket])
        dist.all_reduce(flat)
        for x, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(total.view_as(x))


def broadcast_tensors(tensors: list[torch.Tensor]) -> None:
    """Every rank gets rank 0's values."""
    if world_size() > 1:
        for x in tensors:
            dist.broadcast(x, src=0)


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Rank 0's plain Python value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One plain Python value per rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of one dtype of at most BUCKET_ELEMENTS elements; a larger tensor travels alone."""
    buckets: list[list[torch.Tensor]] = []
    for x in tensors:
        fits = buckets and buckets[-1][0].dtype == x.dtype
        if fits and sum(y.numel() for y in buckets[-1]) + x.numel() <= BUCKET_ELEMENTS:
            buckets[-1].append(x)
        else:
            buckets.append([x])
    return buckets
