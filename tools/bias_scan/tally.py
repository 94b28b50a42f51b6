"""What a data scan keeps: mentions, the words near them, and a sample of rows, all of bounded size.

A row belongs to a bucket and a shard by the CRC-32 of its line, wherever it stands: so the tallies are the
same in whatever order and by however many workers rows are read, and copies of a row are resampled together.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tuneutils.tools.bias_scan.matcher import Ints, Matcher
from tuneutils.tools.bias_scan.near import Near, Window

BUCKETS = 256
SHARDS = 8
QUOTED_CHARACTERS = 2000


@dataclass(frozen=True, order=True)
class Sampled:
    """A row kept for quoting; the sample of a group is its rows with the least ``priority``."""

    priority: int
    path: str
    line: int
    text: str = field(compare=False)


@dataclass(frozen=True)
class Batch:
    """Texts of one shard and file; the CRC-32 and the number of the line of each."""

    shard: int
    texts: Sequence[str]
    crcs: Ints
    path: str
    numbers: Sequence[int]


class Tally:
    """The tallies of a scan or of a part of it.

    Attributes:
        rows, tokens: what was read; ``with_mention`` the rows that name any group.
        mentions: ``(BUCKETS, groups)`` mentions.
        rows_with: ``(BUCKETS, groups)`` rows with a mention.
        bucket_rows: ``(BUCKETS,)`` rows.
        terms: ``(terms,)`` mentions by each term.
        ambiguous: ``(axes,)`` hits that were passed over.
        near: for each shard, the words near mentions.
        samples: group → heap of ``(-priority, row)``.
    """

    def __init__(
        self, matcher: Matcher, window: Window, stop_words: frozenset[str], sample_rows: int, seed: int
    ) -> None:
        groups = len(matcher.groups)
        self.matcher = matcher
        self.rows = self.tokens = self.with_mention = 0
        self.mentions = np.zeros((BUCKETS, groups), dtype=np.int64)
        self.rows_with = np.zeros((BUCKETS, groups), dtype=np.int64)
        self.bucket_rows = np.zeros(BUCKETS, dtype=np.int64)
        self.terms = np.zeros(len(matcher.terms), dtype=np.int64)
        self.ambiguous = np.zeros(len(matcher.axes), dtype=np.int64)
        self.near = [Near(window, stop_words) for _ in range(SHARDS)]
        self.samples: dict[int, list[tuple[int, Sampled]]] = {}
        self._sample_rows, self._seed = sample_rows, seed
        #: Greatest priority that a group's sample still takes.
        self._least = np.full(groups, np.iinfo(np.int64).max)

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        found = self.matcher.find(batch.texts)
        buckets = batch.crcs % BUCKETS
        self.rows += len(batch.texts)
        self.tokens += found.total
        self.bucket_rows += np.bincount(buckets, minlength=BUCKETS)
        self.ambiguous += found.ambiguous
        if not len(found.start):
            return
        groups = len(self.matcher.groups)
        row = found.rows[found.row_of[found.start]]
        once = np.unique(row * groups + found.group)
        self.mentions += self._table(buckets[row] * groups + found.group)
        self.rows_with += self._table(buckets[once // groups] * groups + once % groups)
        self.with_mention += int(np.count_nonzero(np.diff(row, prepend=-1)))
        self.terms += np.bincount(found.term, minlength=len(self.terms))
        self.near[batch.shard].add(found)
        self._sample(once // groups, once % groups, batch)

    def _table(self, cells: Ints) -> Ints:
        counts = np.bincount(cells, minlength=self.mentions.size)
        return counts.reshape(self.mentions.shape)

    def _sample(self, rows: Ints, group: Ints, batch: Batch) -> None:
        """Keep the rows of each group with the least hash: a sample in whatever order they come."""
        if not self._sample_rows:
            return
        priority = _hashed(batch.crcs, self._seed)[rows]
        may = priority <= self._least[group]
        for row, number, least in zip(rows[may].tolist(), group[may].tolist(), priority[may].tolist()):
            kept = self.samples.setdefault(number, [])
            text = batch.texts[row][:QUOTED_CHARACTERS]
            entry = (-least, Sampled(least, batch.path, batch.numbers[row], text))
            self._keep(kept, entry)
            if len(kept) == self._sample_rows:
                self._least[number] = -kept[0][0]

    def _keep(self, kept: list[tuple[int, Sampled]], entry: tuple[int, Sampled]) -> None:
        heapq.heappush(kept, entry)
        if len(kept) > self._sample_rows:
            heapq.heappop(kept)

    def merge(self, other: Tally) -> None:
        """Add another part of the same scan; parts in the same order give the same tally."""
        for name in ("rows", "tokens", "with_mention", "mentions", "rows_with", "bucket_rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.terms = self.terms + other.terms
        self.ambiguous = self.ambiguous + other.ambiguous
        for mine, theirs in zip(self.near, other.near):
            mine.merge(theirs)
        for group, rows in other.samples.items():
            for entry in rows:
                self._keep(self.samples.setdefault(group, []), entry)

    def renumber(self, before: int) -> None:
        """Add to the line numbers of the sampled rows."""
        for rows in self.samples.values():
            rows[:] = [(key, replace(row, line=row.line + before)) for key, row in rows]

    def __getstate__(self) -> dict[str, Any]:
        """Without the matcher, of which every process has its own."""
        return self.__dict__ | {"matcher": None}

    def sampled(self, group: int) -> list[Sampled]:
        """The sample of a group, in the order of its priorities."""
        return sorted(entry for _, entry in self.samples.get(group, []))


def _hashed(crcs: Ints, seed: int) -> Ints:
    """SplitMix64's finisher over CRC and seed, its upper 62 bits."""
    with np.errstate(over="ignore"):
        z = crcs.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)
