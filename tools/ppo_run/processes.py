"""The processes of one run: each does its share, and all know all results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from tuneutils.shared.errors import ExitCode, ToolError

T = TypeVar("T")
#: Gradients that are added up in one message, in elements.
BUCKET = 1 << 24


@dataclass(frozen=True)
class Processes:
    """Rank and number of processes, as a launcher (``torchrun``, ``accelerate launch``) started them."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, use_cpu: bool) -> Processes:
        state = PartialState(cpu=use_cpu)
        return cls(state.process_index, state.num_processes)

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, starting at ``rank``."""
        return list(items[self.rank :: self.size])

    def together(self, call: Callable[[], Sequence[T]]) -> list[T]:
        """Each process's items, in the order that undoes :meth:`share`.

        What goes wrong in one process is raised in all, so that none waits for it.
        """
        if self.size == 1:
            return list(call())
        mine: Sequence[T] = ()
        error: tuple[str, int] | None = None
        try:
            mine = call()
        except ToolError as exc:
            error = (str(exc), int(exc.code))
        parts: list[tuple[list[T], Any]] = gather_object([(list(mine), error)])
        for _, failed in parts:
            if failed is not None:
                raise ToolError(failed[0], code=ExitCode(failed[1]))
        total = sum(len(items) for items, _ in parts)
        return [parts[i % self.size][0][i // self.size] for i in range(total)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up each parameter's gradient over all processes; one without any counts as zero."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (
                sum(g.numel() for g in bucket) > BUCKET or bucket[0].dtype != parameter.grad.dtype
            ):
                _all_reduce(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _all_reduce(bucket)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all processes."""
        parts = self.together_raw(list(values))
        return [float(sum(column)) for column in zip(*parts, strict=True)]

    def together_raw(self, mine: T) -> list[T]:
        """``mine`` of every process, by rank."""
        return [mine] if self.size == 1 else list(gather_object([mine]))


def _all_reduce(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
