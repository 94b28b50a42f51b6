"""Counts of the words near mentions, weighted by distance, in memory that does not grow with the data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan.matcher import Ints, Mentions

MAX_WORDS = 1 << 15
#: Weights are multiples of 2**-20, so that float64 sums of up to 2**33 are exact in whatever order.
GRAIN = float(1 << 20)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """How far around a mention words count, and by how much less with each word between.

    Distances are counted without function words, as GenBit does.
    """

    size: int = 30
    decay: float = 0.95

    @property
    def weights(self) -> Floats:
        """``(size + 1,)`` decay ** distance."""
        return np.round(self.decay ** np.arange(self.size + 1) * GRAIN) / GRAIN


class Near:
    """Weighted counts of words near the mentions of each group.

    When ``MAX_WORDS`` are full the rarer half of the words is forgotten (lossy counting, Manku and Motwani
    2002): a word that comes back starts anew, so its count is too low by ``pruned_below`` a time at most.

    Attributes:
        words: word → column.
        tables: group → ``(MAX_WORDS,)`` counts.
        pruned: words forgotten; ``pruned_below``: the greatest count of one of them.
    """

    def __init__(self, window: Window, stop_words: frozenset[str]) -> None:
        self.window = window
        self.words: dict[bytes, int] = {}
        self.tables: dict[int, Floats] = {}
        self.pruned = 0
        self.pruned_below = 0.0
        self._stop = frozenset(w.encode() for w in stop_words)
        self._free = list(range(MAX_WORDS - 1, -1, -1))

    def add(self, found: Mentions) -> None:
        """Count the words within the window of each mention, in its text; function words do not count."""
        ids = self._columns(found.tokens)
        is_head = np.zeros(len(ids), dtype=bool)
        for more in range(1, int(found.length.max())):
            ids[found.start[found.length > more] + more] = -1
        is_head[found.start] = True
        kept = np.flatnonzero((ids >= 0) | is_head)
        ids, rows = ids[kept], found.row_of[kept]
        place = np.searchsorted(kept, found.start)
        bounds = np.searchsorted(rows, np.arange(len(found.rows) + 1))
        mention_row = found.row_of[found.start]
        low = np.maximum(bounds[mention_row], place - self.window.size)
        high = np.minimum(bounds[mention_row + 1], place + self.window.size + 1)
        counts = high - low
        which = np.repeat(np.arange(len(place)), counts)
        other = np.arange(len(which)) - (np.cumsum(counts) - counts)[which] + low[which]
        distance = np.abs(other - place[which])
        good = (distance > 0) & (ids[other] >= 0)
        which, other, distance = which[good], other[good], distance[good]
        self._scatter(found.group[which], ids[other], self.window.weights[distance])

    def _columns(self, tokens: list[bytes]) -> Ints:
        """``(tokens,)`` columns, new words' too; -1 for what is no content word."""
        for token in sorted(set(tokens).difference(self.words, self._stop)):
            self.column(token)
        return np.fromiter(map(self.words.get, tokens, repeat(-1)), dtype=np.int64, count=len(tokens))

    def column(self, token: bytes) -> int:
        """The token's column, a new one if need be; -1 for what is no content word."""
        known = self.words.get(token)
        if known is not None:
            return known
        if token in self._stop or len(token) < 2 or not token.decode("utf-8", "ignore").isalpha():
            return -1
        if not self._free:
            self._prune()
        self.words[token] = self._free.pop()
        return self.words[token]

    def _prune(self) -> None:
        totals = np.zeros(MAX_WORDS)
        for table in self.tables.values():
            totals += table
        ranked = sorted(self.words, key=lambda w: (totals[self.words[w]], w))
        gone = ranked[: len(ranked) // 2]
        columns = [self.words.pop(word) for word in gone]
        for table in self.tables.values():
            table[columns] = 0.0
        self.pruned += len(gone)
        self.pruned_below = max(self.pruned_below, float(totals[columns].max()))
        self._free = columns[::-1]

    def _scatter(self, group: Ints, column: Ints, weights: Floats) -> None:
        order = np.argsort(group, kind="stable")
        present, starts = np.unique(group[order], return_index=True)
        for number, part in zip(present.tolist(), np.split(order, starts[1:])):
            np.add.at(self.table(number), column[part], weights[part])

    def table(self, group: int) -> Floats:
        if group not in self.tables:
            self.tables[group] = np.zeros(MAX_WORDS)
        return self.tables[group]

    def merge(self, other: Near) -> None:
        """Add another part of the same scan."""
        self.pruned += other.pruned
        self.pruned_below = max(self.pruned_below, other.pruned_below)
        if not self.words:
            self.words, self.tables, self._free = other.words, other.tables, other._free
            return
        for word in sorted(other.words):
            self.column(word)
        kept = [w for w in sorted(other.words) if w in self.words]
        to, source = (np.array([part[w] for w in kept], dtype=np.int64) for part in (self.words, other.words))
        for group in sorted(other.tables):
            self.table(group)[to] += other.tables[group][source]

    def __getstate__(self) -> dict[str, Any]:
        """Tables travel between processes as their cells that are not zero."""
        cells = {group: np.flatnonzero(table) for group, table in self.tables.items()}
        return self.__dict__ | {"tables": {g: (at, self.tables[g][at]) for g, at in cells.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        packed, self.tables = self.tables, {}
        for group, (at, values) in packed.items():
            self.table(group)[at] = values
