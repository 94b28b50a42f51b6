"""Record streams: JSONL (plain, .gz, .zst) or Parquet, one record a line, ``-`` for stdin and stdout.

A record is a JSON object in one of the dataset formats that TRL and ``datasets`` users already have;
fields that a tool does not know pass through untouched.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.files import atomic_file, make_parent
from tuneutils.shared.streams import Record, compressor, plain_row, raw_lines, require_readable, write_parquet

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
    return _format_with(tuple(record))


@lru_cache(maxsize=1024)  # the records of a stream have the same fields
def _format_with(keys: tuple[str, ...]) -> str | None:
    return next((name for name, fields in FORMATS.items() if set(fields) <= set(keys)), None)


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
        if value not in (0, 1) or isinstance(value, float):
            raise ValueError(f"field 'label': must be true or false, is {_kind(value)}")
    elif isinstance(value, list) and name in ("prompt", "completion", "chosen", "rejected"):
        check_messages(name, value)
    elif not isinstance(value, str) or not value.isascii():
        _check_text(f"field {name!r}", value)
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
            _check_text(f"field {name}[{i}].{key}", message.get(key))


def _check_text(place: str, value: Any) -> None:
    """A string that UTF-8 can hold: no tokenizer takes the lone surrogates that JSON escapes allow."""
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a string, is {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            code = f"\\u{ord(value[exc.start]):04x}"
            raise ValueError(f"{place}: lone surrogate {code} at character {exc.start + 1}") from exc


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
        for path in self.paths:
            require_readable(path)
        self.formats = tuple(formats)
        self.on_error = on_error
        self.stats = Stats()
        self._quarantine = Path(quarantine) if quarantine else None
        self._quarantine_started = False
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
        """The records with their places. Each call starts anew: counts, quarantine and all."""
        self.stats = Stats()
        if self.on_error == "quarantine":
            self._start_quarantine()
        for path in self.paths:
            for line, raw in raw_lines(path):
                located = self._parse(path, line, raw)
                if located is not None:
                    self.stats.read += 1
                    yield located
        if not self.stats.read and not self._allow_empty:
            refused = f" ({self.stats.refused} refused)" if self.stats.refused else ""
            raise ToolError(f"{', '.join(map(_shown, self.paths))}: no records{refused}")

    def _parse(self, path: str, line: int, raw: bytes | Record) -> Located | None:
        try:
            record = plain_row(raw) if isinstance(raw, dict) else parse_line(raw)
            if self.formats:
                check(record, self.formats)
            if self._validate is not None:
                self._validate(record)
        except ValueError as exc:
            self.refuse(Located({}, path, line), str(exc), raw)
            return None
        return Located(record, _shown(path), line)

    def refuse(self, located: Located, reason: str, raw: bytes | Record | None = None) -> None:
        """Treat a record as bad, by ``on_error``; tools call it for what only they can judge."""
        if self.on_error == "stop":
            raise BadRecord(located.place, reason)
        self.stats.refused += 1
        self.stats.reasons[reason.split(":")[0] if reason.startswith("field") else reason.split(";")[0]] += 1
        if self.on_error == "quarantine":
            self._keep(located, reason, located.record if raw is None else raw)

    def _start_quarantine(self) -> None:
        """An empty file, even where nothing gets refused: a pipeline may name it as an output."""
        assert self._quarantine is not None
        make_parent(self._quarantine)
        self._quarantine.write_bytes(b"")
        self._quarantine_started = True

    def _keep(self, located: Located, reason: str, raw: bytes | Record) -> None:
        if not self._quarantine_started:
            self._start_quarantine()
        assert self._quarantine is not None
        kept: Record = {"path": _shown(located.path), "line": located.line, "reason": reason}
        with open(self._quarantine, "ab") as sink:
            sink.write(dump_line({**kept, **_kept_fields(raw)}))


def _kept_fields(raw: bytes | Record) -> Record:
    """A refused line as text, and in base64 too where the text cannot give it back byte for byte.

    A row of Parquet that JSON cannot hold is kept as Python writes it.
    """
    if isinstance(raw, dict):
        try:
            dump_line(raw)
        except ToolError:
            return {"raw": repr(raw)}
        return {"record": raw}
    try:
        return {"raw": raw.decode("utf-8")}
    except UnicodeDecodeError:
        import base64

        shown = raw.decode("utf-8", errors="backslashreplace")
        return {"raw": shown, "raw_base64": base64.b64encode(raw).decode("ascii")}


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
        record = _DECODER.decode(text)
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


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"not JSON that can be kept: {text[:20]} is beyond a double")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def dump_line(record: Record) -> bytes:
    """One record as a UTF-8 line; lone surrogates stay escaped, so that the line is valid UTF-8.

    Raises:
        ToolError: the record holds what JSON cannot: NaN, an infinity, bytes, or too deep a nesting.
    """
    try:
        text = _ENCODER.encode(record)
        try:
            return (text + "\n").encode("utf-8")
        except UnicodeEncodeError:
            return (json.dumps(record) + "\n").encode("ascii")
    except (TypeError, ValueError, RecursionError) as exc:
        raise ToolError(f"a record cannot be written as JSON: {exc}") from exc


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
            write_parquet(temporary, [json.loads(line) for line in buffer.getvalue().splitlines()])
        else:
            with open(temporary, "wb") as raw, compressor(name, raw) as sink:
                writer = Writer(sink)
                yield writer


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
