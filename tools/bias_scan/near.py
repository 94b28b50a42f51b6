"""Counts of the words near mentions, weighted by distance, in memory that does not grow with the data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan.matcher import Ints, Mentions

MAX_WORDS = 1 << 15
GROWTH = 1 << 12
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

    With more than ``MAX_WORDS`` words, the half of that number with the greatest counts is kept (lossy
    counting, Manku and Motwani 2002): a word that comes back starts anew, so that its count is too low by
    ``pruned_below`` for each time at most.

    Attributes:
        words: word → column.
        tables: group → ``(width,)`` counts, at least as wide as there are words.
        pruned: words forgotten; ``pruned_below``: the greatest count of one of them.
    """

    def __init__(self, window: Window, stop_words: frozenset[str]) -> None:
        self.window = window
        self.words: dict[bytes, int] = {}
        self.tables: dict[int, Floats] = {}
        self.pruned = 0
        self.pruned_below = 0.0
        self._stop = frozenset(w.encode() for w in stop_words)

    def add(self, found: Mentions) -> None:
        """Count the words within the window of each mention, in its text.

        Function words do not count, nor do the words of phrases that are mentions.
        """
        ids = self._columns(found.tokens)
        is_head = np.zeros(len(ids), dtype=bool)
        phrases = found.length > 1
        for part in range(int(found.length.max())):
            ids[found.start[phrases & (found.length > part)] + part] = -1
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
        self._prune()

    def _columns(self, tokens: list[bytes]) -> Ints:
        """``(tokens,)`` columns, new words' too; -1 for what is no content word."""
        for token in sorted(set(tokens).difference(self.words, self._stop)):
            if len(token) > 1 and token.decode("utf-8", "ignore").isalpha():
                self.words[token] = len(self.words)
        return np.fromiter(map(self.words.get, tokens, repeat(-1)), dtype=np.int64, count=len(tokens))

    def _prune(self) -> None:
        if len(self.words) <= MAX_WORDS:
            return
        totals = np.zeros(len(self.words))
        for group in self.tables:
            totals += self.table(group)[: len(totals)]
        ranked = sorted(self.words, key=lambda w: (-totals[self.words[w]], w))
        kept, gone = ranked[: MAX_WORDS // 2], ranked[MAX_WORDS // 2 :]
        columns = [self.words[word] for word in kept]
        self.tables = {group: table[columns] for group, table in self.tables.items()}
        self.pruned += len(gone)
        self.pruned_below = max(self.pruned_below, float(totals[self.words[gone[0]]]))
        self.words = {word: i for i, word in enumerate(kept)}

    def _scatter(self, group: Ints, column: Ints, weights: Floats) -> None:
        order = np.argsort(group, kind="stable")
        present, starts = np.unique(group[order], return_index=True)
        for number, part in zip(present.tolist(), np.split(order, starts[1:])):
            np.add.at(self.table(number), column[part], weights[part])

    def table(self, group: int) -> Floats:
        """The group's counts, wide enough for all words."""
        table = self.tables.get(group, np.zeros(0))
        if len(table) < len(self.words):
            wider = np.zeros(-(-len(self.words) // GROWTH) * GROWTH)
            wider[: len(table)] = table
            self.tables[group] = table = wider
        return table

    def merge(self, other: Near) -> None:
        """Add another part of the same scan."""
        self.pruned += other.pruned
        self.pruned_below = max(self.pruned_below, other.pruned_below)
        source = np.array(list(other.words.values()), dtype=np.int64)
        to = np.array([self.words.setdefault(w, len(self.words)) for w in other.words], dtype=np.int64)
        for group in sorted(other.tables):
            self.table(group)[to] += other.table(group)[source]
        self._prune()

    def __getstate__(self) -> dict[str, Any]:
        """Tables travel between processes as their cells that are not zero."""
        cells = {group: np.flatnonzero(table) for group, table in self.tables.items()}
        return self.__dict__ | {"tables": {g: (at, self.tables[g][at]) for g, at in cells.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        packed, self.tables = self.tables, {}
        for group, (at, values) in packed.items():
            self.table(group)[at] = values
