"""The pass over the data: lines dealt to shards, shards to workers, tallies back."""

from __future__ import annotations

import multiprocessing
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.lexicons import Lexicon
from tuneutils.shared.records import Located, Reader, Record, dump_line
from tuneutils.shared.streams import plain_row, raw_lines
from tuneutils.tools.bias_scan.matcher import Ints, Matcher
from tuneutils.tools.bias_scan.near import Window
from tuneutils.tools.bias_scan.tally import SHARDS, Batch, Tally
from tuneutils.tools.bias_scan.texts import texts_of

ROUND_ROWS = SHARDS * 2048
ROUND_BYTES = 8 << 20
READ_ROWS = 32


@dataclass
class Block:
    """Lines of one file that belong to one shard, with their CRC-32 and number."""

    shard: int
    path: str
    lines: list[bytes]
    crcs: Ints
    numbers: list[int]


@dataclass(frozen=True)
class Refused:
    """A line that is no record."""

    path: str
    number: int
    reason: str
    raw: bytes | Record


@lru_cache(maxsize=2)
def _matcher(lexicons: tuple[Lexicon, ...]) -> Matcher:
    return Matcher(lexicons)


@dataclass(frozen=True)
class Settings:
    """What every worker needs."""

    lexicons: tuple[Lexicon, ...]
    window: Window
    stop_words: frozenset[str]
    fields: tuple[str, ...]
    sample_rows: int
    seed: int

    @property
    def matcher(self) -> Matcher:
        return _matcher(self.lexicons)

    def tally(self) -> Tally:
        return Tally(self.matcher, self.window, self.stop_words, self.sample_rows, self.seed)


def deal(
    path: str, lines: Iterator[tuple[int, bytes | Record]]
) -> Iterator[tuple[list[Block], list[Refused]]]:
    """The lines of a file in rounds of a bounded size, each a block a shard, and rows that are no JSON."""
    held: list[tuple[int, bytes | Record]] = []
    size = 0
    while some := list(islice(lines, READ_ROWS)):
        held += some
        size += sum(len(raw) for _, raw in some)
        if len(held) >= ROUND_ROWS or size >= ROUND_BYTES:
            yield _dealt(path, held)
            held, size = [], 0
    if held:
        yield _dealt(path, held)


def _dealt(path: str, held: Sequence[tuple[int, bytes | Record]]) -> tuple[list[Block], list[Refused]]:
    lines, numbers, refused = [], [], []
    for number, raw in held:
        try:
            lines.append(raw if isinstance(raw, bytes) else dump_line(plain_row(raw)).rstrip(b"\n"))
            numbers.append(number)
        except ValueError as exc:
            refused.append(Refused(path, number, str(exc), raw))
    crcs = np.fromiter(map(zlib.crc32, lines), dtype=np.int64, count=len(lines))
    blocks = []
    for shard in range(SHARDS):
        at = np.flatnonzero(crcs % SHARDS == shard)
        picked = at.tolist()
        blocks.append(Block(shard, path, [lines[i] for i in picked], crcs[at], [numbers[i] for i in picked]))
    return blocks, refused


def add_block(tally: Tally, block: Block, fields: tuple[str, ...]) -> list[Refused]:
    """Count a block; gives the lines that are no records."""
    texts, kept, bad = texts_of(block.lines, fields)
    if texts:
        numbers = [block.numbers[i] for i in kept]
        tally.add(Batch(block.shard, texts, block.crcs[kept], block.path, numbers))
    return [Refused(block.path, block.numbers[i], reason, block.lines[i]) for i, reason in bad]


def scan(reader: Reader, settings: Settings, workers: int = 1, progress: Any = None) -> Tally:
    """Read all streams of ``reader``, whose ``on_error`` says what becomes of bad lines.

    The tally is the same for any number of workers: a shard is counted by one of them, in the data's order.

    Raises:
        ToolError: a bad line, or no record at all.
    """
    crew: Alone | Crew = Crew(settings, workers) if workers > 1 else Alone(settings)
    try:
        for path in reader.paths:
            for blocks, refused in deal(path, raw_lines(path)):
                refuse(reader, [*refused, *crew.add(blocks)])
                if progress is not None:
                    progress.update(sum(len(block.lines) for block in blocks))
        refuse(reader, crew.rest())
        return crew.tally()
    finally:
        crew.close()


def refuse(reader: Reader, refused: Iterable[Refused]) -> None:
    """Treat bad lines by the reader's ``on_error``, in the order in which they stand."""
    for bad in sorted(refused, key=lambda b: b.number):
        shown = "<stdin>" if bad.path == "-" else bad.path
        reader.refuse(Located({}, shown, bad.number), bad.reason, bad.raw)


class Alone:
    """Counts in this process."""

    def __init__(self, settings: Settings) -> None:
        self._tally, self._fields = settings.tally(), settings.fields

    def add(self, blocks: Sequence[Block]) -> list[Refused]:
        return [bad for block in blocks for bad in add_block(self._tally, block, self._fields)]

    def rest(self) -> list[Refused]:
        return []

    def tally(self) -> Tally:
        return self._tally

    def close(self) -> None:
        pass


class Crew:
    """Processes of which each counts its shards; one round is under way while the next is read."""

    def __init__(self, settings: Settings, workers: int) -> None:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._whole = settings.tally()
        self._pipes: list[Connection] = []
        self._children: list[Any] = []
        self._under_way = False
        for _ in range(min(workers, SHARDS)):
            mine, theirs = context.Pipe()
            child = context.Process(target=_work, args=(settings, theirs), daemon=True)
            child.start()
            theirs.close()
            self._pipes.append(mine)
            self._children.append(child)

    def add(self, blocks: Sequence[Block]) -> list[Refused]:
        """Hand out a round; gives the lines refused in the one before."""
        refused = self.rest()
        for i, pipe in enumerate(self._pipes):
            self._send(pipe, [b for b in blocks if b.shard % len(self._pipes) == i])
        self._under_way = True
        return refused

    def rest(self) -> list[Refused]:
        """Wait for the round that is under way."""
        if not self._under_way:
            return []
        self._under_way = False
        return [bad for pipe in self._pipes for bad in self._receive(pipe)]

    def tally(self) -> Tally:
        for pipe in self._pipes:
            self._send(pipe, None)
        for pipe in self._pipes:
            self._whole.merge(self._receive(pipe))
        return self._whole

    def close(self) -> None:
        for child in self._children:
            child.terminate()
            child.join()

    def _send(self, pipe: Connection, item: Any) -> None:
        try:
            pipe.send(item)
        except (BrokenPipeError, ConnectionResetError):
            self._fail()

    def _receive(self, pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except (EOFError, ConnectionResetError):
            self._fail()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _fail(self) -> None:
        raise ToolError(
            "a worker ended before its work was done (killed for memory?); try fewer --workers",
            code=ExitCode.RETRYABLE,
        )


def _work(settings: Settings, pipe: Connection) -> None:
    tally = settings.tally()
    try:
        while (blocks := pipe.recv()) is not None:
            pipe.send([bad for block in blocks for bad in add_block(tally, block, settings.fields)])
        pipe.send(tally)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass
    except Exception as exc:
        pipe.send(exc)
