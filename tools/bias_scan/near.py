"""Counts of the words near mentions, weighted by distance, in memory that does not grow with the data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan.matcher import Ints, Mentions

MAX_WORDS = 1 << 14
GROWTH = 1 << 12
UNKNOWN = -2
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
        tables: group → ``(width,)`` counts, at least as wide as there are words.
        pruned: words forgotten; ``pruned_below``: the greatest count of one of them.
    """

    def __init__(self, window: Window, stop_words: frozenset[str]) -> None:
        self.window = window
        self._columns: dict[bytes, int] = {w.encode(): -1 for w in stop_words}
        self.tables: dict[int, Floats] = {}
        self.pruned = 0
        self.pruned_below = 0.0
        self._stop_words = len(self._columns)

    def add(self, found: Mentions) -> None:
        """Count the words within the window of each mention, in its text.

        Function words do not count, nor do the words of phrases that are mentions.
        """
        ids = self._column_of_each(found.tokens)
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

    @property
    def words(self) -> dict[bytes, int]:
        """Word → column."""
        return dict(islice(self._columns.items(), self._stop_words, None))

    def __len__(self) -> int:
        return len(self._columns) - self._stop_words

    def _column_of_each(self, tokens: list[bytes]) -> Ints:
        """``(tokens,)`` columns, new words' too; -1 for what is no content word."""
        found = self._looked_up(tokens)
        unknown = {tokens[i] for i in np.flatnonzero(found == UNKNOWN).tolist()}
        new = sorted(t for t in unknown if len(t) > 1 and t.decode("utf-8", "ignore").isalpha())
        if new:
            self._columns.update(zip(new, range(len(self), len(self) + len(new))))
            found = self._looked_up(tokens)
        found[found == UNKNOWN] = -1
        return found

    def _looked_up(self, tokens: list[bytes]) -> Ints:
        return np.fromiter(map(self._columns.get, tokens, repeat(UNKNOWN)), dtype=np.int64, count=len(tokens))

    def _prune(self) -> None:
        if len(self) <= MAX_WORDS:
            return
        words = self.words
        totals = np.zeros(len(words))
        for group in self.tables:
            totals += self.table(group)[: len(totals)]
        ranked = sorted(words, key=lambda w: (-totals[words[w]], w))
        kept, gone = ranked[: MAX_WORDS // 2], ranked[MAX_WORDS // 2 :]
        columns = [words[word] for word in kept]
        self.tables = {group: table[columns] for group, table in self.tables.items()}
        self.pruned += len(gone)
        self.pruned_below = max(self.pruned_below, float(totals[words[gone[0]]]))
        stop_words = dict(islice(self._columns.items(), self._stop_words))
        self._columns = stop_words | {word: i for i, word in enumerate(kept)}

    def _scatter(self, group: Ints, column: Ints, weights: Floats) -> None:
        order = np.argsort(group.astype(np.int16), kind="stable")
        present, starts = np.unique(group[order], return_index=True)
        for number, part in zip(present.tolist(), np.split(order, starts[1:])):
            np.add.at(self.table(number), column[part], weights[part])

    def table(self, group: int) -> Floats:
        """The group's counts, wide enough for all words."""
        table = self.tables.get(group, np.zeros(0))
        if len(table) < len(self):
            wider = np.zeros(-(-len(self) // GROWTH) * GROWTH)
            wider[: len(table)] = table
            self.tables[group] = table = wider
        return table

    def merge(self, other: Near) -> None:
        """Add another part of the same scan."""
        self.pruned += other.pruned
        self.pruned_below = max(self.pruned_below, other.pruned_below)
        words = other.words
        source = np.array(list(words.values()), dtype=np.int64)
        to = np.array([self._columns.setdefault(w, len(self)) for w in words], dtype=np.int64)
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
