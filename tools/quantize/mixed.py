"""Mixed precision by sensitivity: a budget of bits in, a map of bits by matrix out."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.quantizers import Grid


@dataclass(frozen=True)
class Matrix:
    """What the choice for one matrix depends on.

    Attributes:
        shape: (rows, columns).
        errors: bits -> share of the outputs' energy that rounding to nearest loses on calibration data.
    """

    shape: tuple[int, int]
    errors: Mapping[int, float]

    def cost(self, grid: Grid) -> float:
        """Bits in all, scales included."""
        return self.shape[0] * self.shape[1] * grid.bits_per_weight(self.shape[1])


def allocate(matrices: Mapping[str, Matrix], grids: Sequence[Grid], budget: float) -> dict[str, Grid]:
    """The grid of each matrix, by marginal gain: the upgrade that saves most error a bit comes first.

    The errors of a matrix fall convexly with its bits in practice, for which this greedy choice is that of
    the Lagrangian (Shoham and Gersho 1988), short of the last upgrade. Ties go by name, so the map is the
    same in every run.

    Args:
        grids: in rising order of bits.
        budget: bits a weight on average.

    Raises:
        ToolError: the smallest grid takes more than the budget (2).
    """
    weights = sum(m.shape[0] * m.shape[1] for m in matrices.values())
    chosen = dict.fromkeys(matrices, 0)
    spent = sum(m.cost(grids[0]) for m in matrices.values())
    if spent > budget * weights * (1 + 1e-9):
        raise ToolError(
            f"--budget {budget}: the smallest choice takes {spent / weights:.3f} bits a weight; raise it, or "
            "give fewer --mixed-bits or a larger --group-size",
            code=ExitCode.USAGE,
        )

    def upgrade(name: str) -> tuple[float, str, float] | None:
        now = chosen[name]
        if now + 1 == len(grids):
            return None
        matrix = matrices[name]
        more = matrix.cost(grids[now + 1]) - matrix.cost(grids[now])
        gain = matrix.errors[grids[now].bits] - matrix.errors[grids[now + 1].bits]
        return (-gain / more, name, more)

    waiting = [entry for name in sorted(matrices) if (entry := upgrade(name))]
    heapq.heapify(waiting)
    while waiting:
        _, name, more = heapq.heappop(waiting)
        if spent + more > budget * weights * (1 + 1e-9):
            continue
        spent += more
        chosen[name] += 1
        if (entry := upgrade(name)) is not None:
            heapq.heappush(waiting, entry)
    return {name: grids[index] for name, index in chosen.items()}
