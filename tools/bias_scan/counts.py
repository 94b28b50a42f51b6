"""What a data scan keeps: mentions by group and words near them, in memory that does not grow with the data.

Rows fall into ``ROW_BUCKETS`` buckets by their number, mentions are counted in each, and intervals come from
resampling buckets; with fewer rows than buckets each row is a bucket. Words near mentions are counted in
``WORD_BUCKETS`` buckets for a delete-a-group jackknife. Words beyond ``MAX_WORDS`` push out the rarest half.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.bias_scan.matcher import SEPARATOR, Ints, Matcher, Mentions
from tuneutils.tools.bias_scan.stopwords import STOP_WORDS

ROW_BUCKETS = 256
WORD_BUCKETS = 8
MAX_WORDS = 1 << 15
MAX_GROUPS = 64
Floats = NDArray[np.float64]


@dataclass
class Window:
    """How far around a mention words count, and by how much less with each word between."""

    size: int = 30
    decay: float = 0.95


@dataclass
class Counts:
    """The tallies of a scan.

    Attributes:
        rows, tokens: what was read; ``with_mention`` the rows that name any group.
        mentions: ``(ROW_BUCKETS, groups)`` mentions.
        rows_with: ``(ROW_BUCKETS, groups)`` rows with a mention.
        ambiguous: ``(axes,)`` hits that were passed over.
        near: for each group, ``(WORD_BUCKETS, MAX_WORDS)`` weighted counts of words near its mentions.
        words: word → column of ``near``.
        pruned: words pushed out; ``pruned_below``: the greatest count of one of them.
        untracked: groups whose surroundings were not counted, beyond ``MAX_GROUPS``.
    """

    axes: int
    groups: int
    window: Window = field(default_factory=Window)
    rows: int = 0
    tokens: int = 0
    with_mention: int = 0
    words: dict[bytes, int] = field(default_factory=dict)
    near: dict[int, Floats] = field(default_factory=dict)
    pruned: int = 0
    pruned_below: float = 0.0
    untracked: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.mentions = np.zeros((ROW_BUCKETS, self.groups), dtype=np.int64)
        self.rows_with = np.zeros((ROW_BUCKETS, self.groups), dtype=np.int64)
        self.ambiguous = np.zeros(self.axes, dtype=np.int64)
        self._free = list(range(MAX_WORDS - 1, -1, -1))

    def add(self, found: Mentions, row_numbers: Ints) -> None:
        """Count a batch.

        Args:
            row_numbers: ``(n,)`` the number of each text's row in the data.
        """
        self.rows += found.n
        self.tokens += len(found.tokens) - found.n - 1
        self.ambiguous += found.ambiguous
        if not len(found.start):
            return
        row = found.row_of[found.start]
        cells = (row_numbers[row] % ROW_BUCKETS) * self.groups + found.group
        self.mentions += np.bincount(cells, minlength=self.mentions.size).reshape(self.mentions.shape)
        once = np.unique(row * self.groups + found.group)
        cells = (row_numbers[once // self.groups] % ROW_BUCKETS) * self.groups + once % self.groups
        self.rows_with += np.bincount(cells, minlength=self.mentions.size).reshape(self.mentions.shape)
        self.with_mention += len(np.unique(row))
        self._add_near(found, row_numbers)

    def _add_near(self, found: Mentions, row_numbers: Ints) -> None:
        """Words within the window of each mention, in the same text; its own words and function words not."""
        named = np.unique(found.row_of[found.start])
        inside = np.zeros(found.n + 1, dtype=bool)
        inside[named] = True
        wanted = np.flatnonzero(inside[found.row_of])
        ids = np.full(len(found.tokens), -1, dtype=np.int64)
        ids[wanted] = self._ids([found.tokens[i] for i in wanted.tolist()])
        head = np.zeros(len(ids), dtype=bool)
        for more in range(1, int(found.length.max())):
            at = found.start[found.length > more] + more
            ids[at] = -1
        head[found.start] = True
        kept = np.flatnonzero((ids >= 0) | head)
        ids, rows = ids[kept], found.row_of[kept]
        place = np.searchsorted(kept, found.start)
        bounds = np.searchsorted(rows, np.arange(found.n + 1))
        mention_row = found.row_of[found.start]
        low = np.maximum(bounds[mention_row], place - self.window.size)
        high = np.minimum(bounds[mention_row + 1], place + self.window.size + 1)
        counts = high - low
        which = np.repeat(np.arange(len(place)), counts)
        other = np.arange(len(which)) - (np.cumsum(counts) - counts)[which] + low[which]
        distance = np.abs(other - place[which])
        good = (distance > 0) & (ids[other] >= 0)
        which, other, distance = which[good], other[good], distance[good]
        weights = (self.window.decay ** np.arange(self.window.size + 1))[distance]
        bucket = row_numbers[mention_row[which]] % WORD_BUCKETS
        self._scatter(found.group[which], bucket * MAX_WORDS + ids[other], weights)

    def _scatter(self, group: Ints, cell: Ints, weights: Floats) -> None:
        order = np.argsort(group, kind="stable")
        present, starts = np.unique(group[order], return_index=True)
        for number, part in zip(present.tolist(), np.split(order, starts[1:])):
            table = self._table(number)
            if table is not None:
                np.add.at(table.ravel(), cell[part], weights[part])

    def _table(self, group: int) -> Floats | None:
        if group not in self.near:
            if len(self.near) >= MAX_GROUPS:
                self.untracked.add(group)
                return None
            self.near[group] = np.zeros((WORD_BUCKETS, MAX_WORDS))
        return self.near[group]

    def _ids(self, tokens: list[bytes]) -> Ints:
        """The columns of words, new ones given; -1 for function words, numbers, separators."""
        ids = list(map(self.words.get, tokens))
        if None in ids:
            unknown = {t for t, i in zip(tokens, ids) if i is None}
            for token in sorted(unknown):
                self.words[token] = self._new(token)
            ids = list(map(self.words.get, tokens))
        return np.array(ids, dtype=np.int64)

    def _new(self, token: bytes) -> int:
        if (
            token == SEPARATOR
            or token.isdigit()
            or len(token) < 2
            or token.decode("utf-8", "ignore") in STOP_WORDS
        ):
            return -1
        if not self._free:
            self._prune()
        return self._free.pop()

    def _prune(self) -> None:
        """Forget the rarer half of the words, and the tokens that never count."""
        totals = np.zeros(MAX_WORDS)
        for table in self.near.values():
            totals += table.sum(axis=0)
        counted = {w: i for w, i in self.words.items() if i >= 0}
        ranked = sorted(counted, key=lambda w: (totals[counted[w]], w))
        gone = ranked[: len(ranked) // 2]
        columns = [counted[w] for w in gone]
        for table in self.near.values():
            table[:, columns] = 0.0
        self.pruned += len(gone)
        self.pruned_below = max(self.pruned_below, float(totals[columns].max()))
        kept = {w: counted[w] for w in ranked[len(ranked) // 2 :]}
        self.words = kept
        self._free = sorted(set(range(MAX_WORDS)) - set(kept.values()), reverse=True)

    def merge(self, other: Counts) -> None:
        """Add another part of the same scan."""
        for name in ("rows", "tokens", "with_mention", "pruned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mentions += other.mentions
        self.rows_with += other.rows_with
        self.ambiguous += other.ambiguous
        self.pruned_below = max(self.pruned_below, other.pruned_below)
        self.untracked |= other.untracked
        words = [(w, i) for w, i in sorted(other.words.items()) if i >= 0]
        for word, _ in words:
            if word not in self.words:
                self.words[word] = self._new(word)
        moved = [(self.words[w], i) for w, i in words if self.words.get(w, -1) >= 0]
        to, source = (np.array(c, dtype=np.int64) for c in zip(*moved)) if moved else (np.zeros(0, int),) * 2
        for group in sorted(other.near):
            table = self._table(group)
            if table is not None:
                table[:, to] += other.near[group][:, source]


def count(matcher: Matcher, texts: list[str], window: Window | None = None) -> Counts:
    """The tallies of texts that fit in memory."""
    made = Counts(len(matcher.axes), len(matcher.groups), window or Window())
    made.add(matcher.find(texts), np.arange(len(texts)))
    return made
