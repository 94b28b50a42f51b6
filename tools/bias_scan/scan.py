"""The pass over the data: blocks of lines in, tallies and a sample of rows out, in one process or several."""

from __future__ import annotations

import heapq
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from tuneutils.shared.lexicons import Lexicon
from tuneutils.shared.records import Located, Reader
from tuneutils.shared.streams import raw_lines
from tuneutils.tools.bias_scan.counts import Counts, Window
from tuneutils.tools.bias_scan.matcher import Ints, Matcher, Mentions
from tuneutils.tools.bias_scan.texts import Record, parse_block, parse_one, text_of

BLOCK_ROWS = 2048
QUOTED_CHARACTERS = 4000


@dataclass(frozen=True)
class Block:
    """Consecutive lines of one file: ``(line number, raw)``."""

    number: int
    path: str
    lines: list[tuple[int, bytes | Record]]


@dataclass(frozen=True)
class Refused:
    """A line that is no record."""

    block: int
    path: str
    line: int
    reason: str
    raw: bytes | Record


@dataclass(frozen=True, order=True)
class Sampled:
    """A row kept for quoting; the sample of a group is its rows with the least ``priority``."""

    priority: int
    path: str
    line: int
    text: str = field(compare=False)


@dataclass
class Tally:
    """One worker's part of a scan."""

    matcher: Matcher
    counts: Counts
    fields: tuple[str, ...]
    sample_rows: int
    seed: int
    samples: dict[int, list[tuple[int, Sampled]]] = field(default_factory=dict)

    def add(self, block: Block) -> list[Refused]:
        """Count a block; gives the lines that are no records."""
        texts, lines, refused = self._texts(block)
        if texts:
            numbers = block.number * BLOCK_ROWS + np.arange(len(texts), dtype=np.int64)
            found = self.matcher.find(texts)
            self.counts.add(found, numbers)
            self._sample(found, numbers, texts, lines, block.path)
        return refused

    def _texts(self, block: Block) -> tuple[list[str], list[int], list[Refused]]:
        records = parse_block(block.lines)
        if records is not None:
            try:
                return [text_of(r, self.fields) for r in records], [n for n, _ in block.lines], []
            except ValueError:
                pass
        texts, lines, refused = [], [], []
        for line, raw in block.lines:
            try:
                texts.append(text_of(parse_one(raw), self.fields))
                lines.append(line)
            except ValueError as exc:
                refused.append(Refused(block.number, block.path, line, str(exc), raw))
        return texts, lines, refused

    def _sample(self, found: Mentions, numbers: Ints, texts: list[str], lines: list[int], path: str) -> None:
        """Keep the rows of each group with the least hash of their number: a sample in whatever order."""
        groups = len(self.matcher.groups)
        once = np.unique(found.row_of[found.start] * groups + found.group)
        rows, group = once // groups, once % groups
        priority = _hashed(numbers[rows], self.seed)
        for i in range(len(once)):
            kept = self.samples.setdefault(int(group[i]), [])
            key = -int(priority[i])
            if len(kept) >= self.sample_rows and key <= kept[0][0]:
                continue
            row = int(rows[i])
            text = texts[row][:QUOTED_CHARACTERS]
            entry = (key, Sampled(-key, path, lines[row], text))
            (heapq.heappush if len(kept) < self.sample_rows else heapq.heappushpop)(kept, entry)

    def merge(self, other: Tally) -> None:
        self.counts.merge(other.counts)
        for group, rows in other.samples.items():
            both = self.samples.get(group, []) + rows
            self.samples[group] = heapq.nlargest(self.sample_rows, both)
            heapq.heapify(self.samples[group])

    def sampled(self, group: int) -> list[Sampled]:
        """The sample of a group, in the order of its priorities."""
        return sorted(entry for _, entry in self.samples.get(group, []))


def _hashed(numbers: Ints, seed: int) -> Ints:
    """SplitMix64 of the row's number, its upper 62 bits."""
    with np.errstate(over="ignore"):
        z = numbers.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


@dataclass(frozen=True)
class Settings:
    """What every worker needs."""

    lexicons: tuple[Lexicon, ...]
    window: Window
    fields: tuple[str, ...]
    sample_rows: int
    seed: int

    def tally(self) -> Tally:
        matcher = Matcher(self.lexicons)
        counts = Counts(len(matcher.axes), len(matcher.groups), self.window)
        return Tally(matcher, counts, self.fields, self.sample_rows, self.seed)


def blocks(paths: Sequence[str]) -> Iterator[Block]:
    """The lines of streams in blocks."""
    number = 0
    for path in paths:
        lines = iter(raw_lines(path))
        while chunk := list(islice(lines, BLOCK_ROWS)):
            yield Block(number, path, chunk)
            number += 1


def scan(reader: Reader, settings: Settings, workers: int = 1, progress: Any = None) -> Tally:
    """Read all streams of ``reader``, whose ``on_error`` says what becomes of bad lines.

    The tallies do not depend on ``workers``, but for the last digits of sums, and for rare words in data
    with more distinct words than are kept.

    Raises:
        ToolError: a bad line, or no record at all.
    """
    if workers > 1:
        return _scan_apart(reader, settings, workers, progress)
    tally = settings.tally()
    for block in blocks(reader.paths):
        for bad in tally.add(block):
            refuse(reader, bad)
        if progress is not None:
            progress.update(len(block.lines))
    return tally


def refuse(reader: Reader, bad: Refused) -> None:
    shown = "<stdin>" if bad.path == "-" else bad.path
    reader.refuse(Located({}, shown, bad.line), bad.reason, bad.raw)


def _scan_apart(reader: Reader, settings: Settings, workers: int, progress: Any) -> Tally:
    """Block ``i`` goes to worker ``i mod workers``, through a short queue, so that memory stays bounded."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answers: Any = context.Queue()
    queues: list[Any] = [context.Queue(maxsize=4) for _ in range(workers)]
    children = [context.Process(target=_work, args=(settings, q, answers), daemon=True) for q in queues]
    for child in children:
        child.start()
    try:
        for block in blocks(reader.paths):
            _put(queues[block.number % workers], block, children)
            if progress is not None:
                progress.update(len(block.lines))
        for queue in queues:
            _put(queue, None, children)
        parts = sorted((answers.get() for _ in queues), key=lambda part: part[0])
    finally:
        for child in children:
            child.terminate()
    for bad in sorted((b for _, refused, _ in parts for b in refused), key=lambda b: (b.block, b.line)):
        refuse(reader, bad)
    whole: Tally = parts[0][2]
    for _, _, tally in parts[1:]:
        whole.merge(tally)
    return whole


def _put(queue: Any, item: Block | None, children: Sequence[Any]) -> None:
    """Hand over a block; a worker that died (killed for memory) is an error instead of a hang."""
    from queue import Full

    while True:
        try:
            queue.put(item, timeout=5)
            return
        except Full:
            dead = [c for c in children if c.exitcode not in (None, 0)]
            if dead:
                raise MemoryError(f"a worker ended with status {dead[0].exitcode}") from None


def _work(settings: Settings, queue: Any, answers: Any) -> None:
    tally = settings.tally()
    refused: list[Refused] = []
    first = sys.maxsize
    while (block := queue.get()) is not None:
        first = min(first, block.number)
        refused += tally.add(block)
    answers.put((first, refused, tally))
