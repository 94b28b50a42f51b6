"""Record streams: JSONL (plain, .gz, .zst) or Parquet, one record a line, ``-`` for stdin and stdout.

A record is a JSON object in one of the dataset formats that TRL and ``datasets`` users already have;
fields that a tool does not know pass through untouched.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tuneutils.shared.errors import ExitCode, ToolError, nearest, require

Record = dict[str, Any]

STREAM_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".parquet")

#: The formats and the fields that make each; the first that fits names the record.
FORMATS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "implicit-preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "parallel": ("src", "tgt", "src_lang", "tgt_lang"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}


@dataclass
class Stats:
    """What a reader met: records given out, refused, and the reasons with their counts."""

    read: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Located:
    """A record and where it stands, for error messages: ``file:line``."""

    record: Record
    path: str
    line: int

    @property
    def place(self) -> str:
        return f"{_shown(self.path)}:{self.line}"


class BadRecord(ToolError):
    """A line that is not a valid record; ``reason`` is what quarantine keeps."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}", code=ExitCode.BAD_DATA)
        self.reason = reason


def format_of(record: Record) -> str | None:
    """The name of the record's format, or None."""
    for name, fields in FORMATS.items():
        if all(f in record for f in fields):
            return name
    return None


def check(record: Record, formats: Sequence[str]) -> str:
    """The record's format, if it is one of ``formats`` and its fields have the right types.

    Raises:
        ValueError: with the field and the reason, for the caller to place.
    """
    found = format_of(record)
    if found is None or found not in formats:
        wanted = " or ".join("+".join(FORMATS[f]) for f in formats)
        hint = _misspelt(record, formats)
        raise ValueError(f"needs the fields {wanted}; has {', '.join(sorted(record)) or 'none'}{hint}")
    for name in FORMATS[found]:
        _check_field(name, record[name])
    return found


def _misspelt(record: Record, formats: Sequence[str]) -> str:
    wanted = {f for name in formats for f in FORMATS[name]}
    for key in record:
        if key not in wanted and (hint := nearest(key, wanted)):
            return f"; field {key!r}{hint}"
    return ""


def _check_field(name: str, value: Any) -> None:
    if name == "messages":
        check_messages(name, value)
    elif name == "label":
        if not isinstance(value, (bool, int)):
            raise ValueError(f"field 'label': must be true or false, is {_kind(value)}")
    elif isinstance(value, list) and name in ("prompt", "completion", "chosen", "rejected"):
        check_messages(name, value)
    elif not isinstance(value, str):
        raise ValueError(f"field {name!r}: must be a string, is {_kind(value)}")
    if name in ("completion", "text", "chosen", "rejected") and isinstance(value, str) and not value.strip():
        raise ValueError(f"field {name!r}: is empty")


def check_messages(name: str, value: Any) -> None:
    """A non-empty list of ``{"role": str, "content": str}``."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r}: must be a non-empty list of messages, is {_kind(value)}")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"field {name}[{i}]: must be an object, is {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"field {name}[{i}].{key}: must be a string, is {_kind(message.get(key))}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


class Reader:
    """Iterates over the records of one or more streams, naming file and line of what is wrong.

    Args:
        paths: files, ``-`` for stdin, or directory artifacts that hold one stream.
        formats: the formats allowed; none checks only that each line is a JSON object.
        on_error: ``stop`` raises at the first bad record, ``skip`` counts it, ``quarantine`` also
            writes it with its reason to ``quarantine``.
        quarantine: the file for refused lines.

    After iteration ``stats`` holds the counts. A stream without any record raises (exit 65) unless
    ``allow_empty``.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        formats: Sequence[str] = (),
        on_error: str = "stop",
        quarantine: str | os.PathLike[str] | None = None,
        allow_empty: bool = False,
        validate: Callable[[Record], None] | None = None,
    ) -> None:
        self.paths = [str(stream_path(p)) for p in paths]
        self.formats = tuple(formats)
        self.on_error = on_error
        self.stats = Stats()
        self._quarantine_path = Path(quarantine) if quarantine else None
        self._quarantine: IO[bytes] | None = None
        self._allow_empty = allow_empty
        self._validate = validate
        if on_error == "quarantine" and quarantine is None:
            raise ToolError(
                "--on-error quarantine needs -o FILE to put refused lines beside", code=ExitCode.USAGE
            )

    def __iter__(self) -> Iterator[Record]:
        for located in self.located():
            yield located.record

    def located(self) -> Iterator[Located]:
        """The records with their places."""
        try:
            for path in self.paths:
                for line, raw in _raw_lines(path):
                    located = self._parse(path, line, raw)
                    if located is not None:
                        self.stats.read += 1
                        yield located
            if not self.stats.read and not self._allow_empty:
                refused = f" ({self.stats.refused} refused)" if self.stats.refused else ""
                raise ToolError(f"{', '.join(map(_shown, self.paths))}: no records{refused}")
        finally:
            if self._quarantine is not None:
                self._quarantine.close()

    def _parse(self, path: str, line: int, raw: bytes | Record) -> Located | None:
        place = f"{_shown(path)}:{line}"
        try:
            record = raw if isinstance(raw, dict) else parse_line(raw)
            if self.formats:
                check(record, self.formats)
            if self._validate is not None:
                self._validate(record)
        except ValueError as exc:
            self.refuse(Located({}, path, line), str(exc), raw)
            return None
        return Located(record, place.rsplit(":", 1)[0] if path == "-" else path, line)

    def refuse(self, located: Located, reason: str, raw: bytes | Record | None = None) -> None:
        """Treat a record as bad, by ``on_error``; tools call it for what only they can judge."""
        if self.on_error == "stop":
            raise BadRecord(located.place, reason)
        self.stats.refused += 1
        self.stats.reasons[reason.split(":")[0] if reason.startswith("field") else reason.split(";")[0]] += 1
        if self.on_error == "quarantine":
            self._keep(located, reason, located.record if raw is None else raw)

    def _keep(self, located: Located, reason: str, raw: bytes | Record) -> None:
        if self._quarantine is None:
            assert self._quarantine_path is not None
            self._quarantine_path.parent.mkdir(parents=True, exist_ok=True)
            self._quarantine = open(self._quarantine_path, "wb")  # noqa: SIM115 - closed by located()
        kept: Record = {"path": _shown(located.path), "line": located.line, "reason": reason}
        if isinstance(raw, dict):
            kept["record"] = raw
        else:
            kept["raw"] = raw.decode("utf-8", errors="backslashreplace")
        self._quarantine.write(dump_line(kept))
        self._quarantine.flush()


def read(
    path: str | os.PathLike[str], *, formats: Sequence[str] = (), allow_empty: bool = False
) -> list[Record]:
    """All records of a stream, stopping at the first bad one."""
    return list(Reader([path], formats=formats, allow_empty=allow_empty))


def parse_line(raw: bytes) -> Record:
    """One JSON object of a UTF-8 line.

    Raises:
        ValueError: naming the byte or column, without the place.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"not UTF-8: byte 0x{raw[exc.start]:02x} at byte {exc.start + 1}") from exc
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as exc:
        cut = "; the line seems cut off" if exc.pos >= len(text.rstrip()) or "Unterminated" in exc.msg else ""
        raise ValueError(f"not JSON: {exc.msg} at column {exc.colno}{cut}") from exc
    except RecursionError as exc:
        raise ValueError("not JSON: nested too deeply") from exc
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, is {_kind(record)}")
    return record


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name} is no JSON number")


def dump_line(record: Record) -> bytes:
    """One record as a UTF-8 line; lone surrogates stay escaped, so that the line is valid UTF-8."""
    try:
        return (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:
        return (json.dumps(record, allow_nan=False) + "\n").encode("ascii")


class Writer:
    """Writes records to a stream; use ``open_writer``."""

    def __init__(self, sink: IO[bytes]) -> None:
        self._sink = sink
        self.written = 0

    def write(self, record: Record) -> None:
        self._sink.write(dump_line(record))
        self.written += 1


@contextmanager
def open_writer(path: str | os.PathLike[str]) -> Iterator[Writer]:
    """A writer to a file that appears under its name only when complete, or to stdout for ``-``.

    Parquet output holds its records in memory until the end.
    """
    name = str(path)
    if name == "-":
        writer = Writer(sys.stdout.buffer)
        yield writer
        sys.stdout.buffer.flush()
        return
    with atomic_file(Path(name)) as temporary:
        if name.endswith(".parquet"):
            buffer = io.BytesIO()
            writer = Writer(buffer)
            yield writer
            _write_parquet(buffer, temporary)
        else:
            with open(temporary, "wb") as raw, _compressor(name, raw) as sink:
                writer = Writer(sink)
                yield writer


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that is synced and renamed to it at the end, or removed on failure."""
    if path.is_dir():
        raise ToolError(f"{path}: is a directory", code=ExitCode.CANNOT_WRITE)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as done:
            os.fsync(done.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Write a whole stream; returns the number of records."""
    with open_writer(path) as writer:
        for record in records:
            writer.write(record)
    return writer.written


def stream_path(path: str | os.PathLike[str]) -> Path | str:
    """A stream's file: ``path`` itself, or the only stream inside a directory artifact."""
    if str(path) == "-":
        return "-"
    found = Path(path)
    if not found.is_dir():
        return found
    inside = sorted(p for p in found.iterdir() if p.name.endswith(STREAM_SUFFIXES))
    if len(inside) == 1:
        return inside[0]
    names = ", ".join(p.name for p in inside) or "none"
    raise ToolError(
        f"{found}: a directory with {len(inside)} record streams ({names}); name one of them",
        code=ExitCode.MISSING_INPUT,
    )


def _shown(path: str) -> str:
    return "<stdin>" if path == "-" else path


def _raw_lines(path: str) -> Iterator[tuple[int, bytes | Record]]:
    if path.endswith(".parquet"):
        yield from enumerate(_parquet_rows(path), 1)
        return
    with _open_binary(path) as source:
        try:
            for number, raw in enumerate(source, 1):
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                if raw.strip():
                    yield number, raw.rstrip(b"\r\n")
        except (EOFError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno is not None:
                raise
            raise ToolError(f"{path}: damaged or cut-off compressed file: {exc}") from exc


@contextmanager
def _open_binary(path: str) -> Iterator[IO[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
    elif path.endswith(".gz"):
        import gzip

        with gzip.open(path, "rb") as stream:
            yield stream  # type: ignore[misc]
    elif path.endswith(".zst"):
        import zstandard

        with open(path, "rb") as raw:
            try:
                with zstandard.ZstdDecompressor().stream_reader(raw) as reader:
                    yield io.BufferedReader(reader)  # type: ignore[type-var]
            except zstandard.ZstdError as exc:
                raise ToolError(f"{path}: damaged compressed file: {exc}") from exc
    else:
        with open(path, "rb") as stream:
            yield stream


@contextmanager
def _compressor(name: str, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    if name.endswith(".gz"):
        import gzip

        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as sink:
            yield sink
    elif name.endswith(".zst"):
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) as sink:
            yield sink
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
    except pa.ArrowInvalid as exc:
        raise ToolError(f"{path}: not Parquet: {exc}") from exc


def _write_parquet(buffer: io.BytesIO, path: Path) -> None:
    require("pyarrow", "parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in buffer.getvalue().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), path)
