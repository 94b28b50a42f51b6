"""The bytes below record streams: lines out of plain, gzip and Zstandard files, rows out of Parquet."""

from __future__ import annotations

import io
import math
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from tuneutils.shared.errors import ExitCode, ToolError, require

Record = dict[str, Any]


def raw_lines(path: str) -> Iterator[tuple[int, bytes | Record]]:
    if path.endswith(".parquet"):
        yield from enumerate(_parquet_rows(path), 1)
        return
    with open_binary(path) as source:
        try:
            for number, raw in enumerate(source, 1):
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                if raw.strip():
                    yield number, raw.rstrip(b"\r\n")
        except (EOFError, OSError, zlib.error) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise
            raise ToolError(f"{path}: damaged or cut-off compressed file: {exc}") from exc


@contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
    elif path.endswith(".gz"):
        import gzip

        with gzip.open(path, "rb") as packed:
            yield io.BufferedReader(packed)
    elif path.endswith(".zst"):
        with open(path, "rb") as raw:
            yield io.BufferedReader(_ZstdRaw(raw), 1 << 16)
    else:
        with open(path, "rb") as stream:
            yield stream


class _ZstdRaw(io.RawIOBase):
    """Decompresses all frames of a file; python-zstandard's own reader takes a cut-off frame for its end."""

    def __init__(self, source: IO[bytes]) -> None:
        import zstandard

        self._source = source
        self._error = zstandard.ZstdError
        self._start = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._start()
        self._inside = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._ready:
            block = (self._frame.unused_data if self._frame.eof else b"") or self._source.read(1 << 16)
            if not block:
                if self._inside:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = self._start()
            try:
                self._ready = self._frame.decompress(block)
            except self._error as exc:
                raise EOFError(str(exc)) from exc
            self._inside = not self._frame.eof
        count = min(len(into), len(self._ready))
        into[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def compressor(name: str, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    if name.endswith(".gz"):
        import gzip

        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as sink:
            yield cast("IO[bytes]", sink)
    elif name.endswith(".zst"):
        import zstandard

        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(raw, closefd=False) as sink:
            yield cast("IO[bytes]", sink)
    else:
        yield raw


def _parquet_rows(path: str) -> Iterator[Record]:
    require("pyarrow", "parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
        for batch in table.iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise
        raise ToolError(f"{path}: not Parquet, or damaged: {' '.join(str(exc).split())[:200]}") from exc


def plain_row(row: Record) -> Record:
    """A Parquet row as JSON has it: null is an absent field, a date or decimal its text."""
    return {k: _plain(f"field {k!r}", v) for k, v in row.items() if v is not None}


def _plain(place: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(place, v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(place, v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} is no JSON number")
    if isinstance(value, (bytes, bytearray)):
        raise ValueError(f"{place}: bytes have no JSON form")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def write_parquet(path: Path, rows: list[Record]) -> None:
    require("pyarrow", "parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict.fromkeys(key for row in rows for key in row)
    try:
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), path)
    except (pa.ArrowException, OverflowError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ToolError(f"{path}: these records do not fit Parquet: {reason}; write .jsonl.zst") from exc


def require_readable(path: str) -> None:
    """Fail before any work for an input that is not there or may not be read (exit 66)."""
    if path == "-":
        return
    if not os.path.exists(path):
        raise ToolError(f"{path}: no such file or directory", code=ExitCode.MISSING_INPUT)
    if not os.access(path, os.R_OK):
        raise ToolError(f"{path}: may not be read", code=ExitCode.MISSING_INPUT)
