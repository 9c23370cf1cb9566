"""Numbered batches that threads make ahead of the training step; they are those that would be made in between.

Trap: it is the reader who knows which number comes next. After it has gone to another one, `forget` first.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

AHEAD_PER_THREAD = 2  # batches that wait in memory, per thread

B = TypeVar("B")


class Ahead(Generic[B]):
    """`make(number)` for number after number; `threads` 0 makes each when it is asked for."""

    def __init__(self, make: Callable[[int], B], threads: int, name: str) -> None:
        self._make, self._threads = make, threads
        self._pool = ThreadPoolExecutor(threads, name) if threads else None
        self._waiting: deque[Future[B]] = deque()

    def get(self, number: int) -> B:
        """That batch; the ones that follow it are begun."""
        if self._pool is None:
            return self._make(number)
        while len(self._waiting) <= AHEAD_PER_THREAD * self._threads:
            self._waiting.append(self._pool.submit(self._make, number + len(self._waiting)))
        return self._waiting.popleft().result()

    def forget(self) -> None:
        """Drop what waits."""
        for made in self._waiting:
            made.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown()
