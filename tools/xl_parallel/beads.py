"""The cheapest monotone path through two documents: beads of a source and b target sentences.

Row i of the table is the prefix of i source sentences. All beads that take a source sentence come from
earlier rows, so a row is one vector operation a kind of bead; those that take target sentences alone are a
running minimum along it. With a band, row i has the columns ``left[i] … left[i] + width - 1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: (source sentences, target sentences)
Kind = tuple[int, int]


class Bead(NamedTuple):
    """Source sentences ``[src_start, src_end)`` with target sentences ``[tgt_start, tgt_end)``."""

    src_start: int
    src_end: int
    tgt_start: int
    tgt_end: int


#: Costs of the beads of each kind that end at source row i and columns ``start … start + width - 1``:
#: an array ``(kinds, width)``. What does not exist (fewer than b sentences before) may hold anything.
RowCosts = Callable[[int, int, int], Floats]


def best_path(
    n: int, m: int, kinds: Sequence[Kind], costs: RowCosts, insertion: Floats, left: Ints, width: int
) -> list[Bead]:
    """The beads of least total cost that cover both documents.

    Args:
        n, m: sentences of source and target.
        kinds: with at least one source sentence each; (1, 0) leaves one out.
        costs: see ``RowCosts``.
        insertion: ``(m,)``, cost of each target sentence left out.
        left: ``(n + 1,)``, ascending: first column of each row's band.
        width: columns of the band.

    Raises:
        ValueError: no path lies within the band.
    """
    totals = np.empty((len(kinds), width))
    sums = np.concatenate([[0.0], np.cumsum(insertion), np.zeros(width)])  # the end is beyond the table
    table = np.full((n + 1, width), np.inf)
    back = np.full((n + 1, width), -1, np.int16)  # -1: a target sentence left out
    table[0, : min(width, m + 1)] = sums[: min(width, m + 1)]
    starts = left.tolist()
    for i, start in enumerate(starts[1:], 1):
        row_costs = costs(i, start, width)
        totals.fill(np.inf)
        for k, (a, b) in enumerate(kinds):
            if a > i:
                continue
            shift = start - starts[i - a] - b  # column c here is column c + shift there
            first, last = max(0, -shift, b - start), min(width, width - shift, m + 1 - start)
            if first >= last:
                continue
            before = table[i - a, first + shift : last + shift]
            np.add(before, row_costs[k, first:last], out=totals[k, first:last])
        row, choice = totals.min(0), totals.argmin(0)
        slope = sums[start : start + width]
        running = np.minimum.accumulate(row - slope) + slope
        inserted = running < row - 1e-12
        choice[inserted] = -1
        row = np.where(inserted, running, row)
        row[max(m + 1 - start, 0) :] = np.inf
        table[i], back[i] = row, choice
    return _traced(n, m, kinds, table, back, left)


def _traced(n: int, m: int, kinds: Sequence[Kind], table: Floats, back: Ints, left: Ints) -> list[Bead]:
    width = table.shape[1]
    i, j = n, m
    if not 0 <= j - left[i] < width or not np.isfinite(table[i, j - left[i]]):
        raise ValueError("no path lies within the band")
    beads = []
    while i or j:
        kind = int(back[i, j - left[i]]) if i else -1
        a, b = kinds[kind] if kind >= 0 else (0, 1)
        beads.append(Bead(i - a, i, j - b, j))
        i, j = i - a, j - b
    return beads[::-1]


def whole(n: int, m: int) -> tuple[Ints, int]:
    """The band that is the whole table."""
    return np.zeros(n + 1, np.int64), m + 1
