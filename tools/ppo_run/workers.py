"""Threads that each take a micro-batch of their own, on a CPU.

A micro-batch's operations are so short that waking the other cores for each costs what it saves. A thread to
each micro-batch keeps every core at work. The gradients are added up in the order of the micro-batches,
whichever thread is ahead, so that the sum is the same to the last bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")
#: A worker with fewer rows than this reads the weights for too little.
LEAST_ROWS = 4


class Workers:
    """``size`` threads, with as many for the operations of each as there are cores to share."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self._each = max(1, torch.get_num_threads() // size)
        self._pool: ThreadPoolExecutor | None = None

    @classmethod
    def for_rows(cls, rows: int, where: torch.device) -> Workers:
        """As many as ``rows`` in memory at once, and the cores, allow; one on anything but a CPU."""
        cores = torch.get_num_threads() if where.type == "cpu" else 1
        return cls(max(1, min(cores, rows // LEAST_ROWS)))

    def map(self, call: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``call`` of each, in order; of what goes wrong the first is raised, when all have ended."""
        if self.size == 1:
            return [call(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self.size, initializer=torch.set_num_threads, initargs=(self._each,)
            )
        futures = [self._pool.submit(call, item) for item in items]
        try:
            done = [future.exception() for future in futures]
        except BaseException:  # interrupted: what has not begun must not keep the process alive
            for future in futures:
                future.cancel()
            raise
        failed = next((exc for exc in done if exc is not None), None)
        if failed is not None:
            raise failed
        return [future.result() for future in futures]


class Turns:
    """Lets each parameter take the gradients of numbered backward passes in their order."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._added: dict[int, int] = {}
        self._ended: set[int] = set()
        self._change = threading.Condition()
        self._mine = threading.local()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile backward passes must be within :meth:`pass_number`."""
        handles: list[Any] = []
        for parameter in self._parameters:
            handles.append(parameter.register_hook(self._waiting(id(parameter))))
            handles.append(parameter.register_post_accumulate_grad_hook(self._count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def pass_number(self, number: int) -> Iterator[None]:
        """The backward pass of this thread; passes are numbered from 0 after each :meth:`restart`."""
        self._mine.number = number
        try:
            yield
        finally:
            with self._change:
                self._ended.add(number)
                self._change.notify_all()

    def restart(self) -> None:
        self._added.clear()
        self._ended.clear()

    def _waiting(self, key: int) -> Callable[[Tensor], None]:
        def wait(_grad: Tensor) -> None:
            number = self._mine.number
            with self._change:
                self._change.wait_for(lambda: self._is_next(key, number))

        return wait

    def _is_next(self, key: int, number: int) -> bool:
        """All before have added theirs, or have ended without."""
        return all(n < self._added.get(key, 0) or n in self._ended for n in range(number))

    def _count(self, parameter: Tensor) -> None:
        with self._change:
            self._added[id(parameter)] = self._mine.number + 1
            self._change.notify_all()
