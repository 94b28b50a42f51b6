"""Rows of JSON, JSONL, CSV, TSV, Parquet and TXT files, each with the line it starts on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.records import STREAM_SUFFIXES, BadRecord, Located, Reader, Record

TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*STREAM_SUFFIXES, ".json", *TABLES, ".txt", ".md")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class RowOptions:
    """How files are cut into rows: see the options of the same names."""

    records_key: str | None = None
    text_unit: str = "line"


def data_files(paths: Sequence[Path], shown: str) -> list[Path]:
    """The files to read of a resolved source: itself, or all data files of a folder in the order of names.

    Raises:
        ToolError: none is of a kind that can be read (66).
    """
    if len(paths) == 1 and paths[0].is_dir():
        inside = sorted(p for p in paths[0].rglob("*") if p.is_file())
        found = [p for p in inside if p.name.endswith(SUFFIXES) and p.name != "README.md"]
        if not found:
            raise ToolError(
                f"{shown}: no {', '.join(SUFFIXES)} file in the folder", code=ExitCode.MISSING_INPUT
            )
        return found
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ToolError(f"{path}: unknown ending {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    return list(paths)


def rows(path: str, options: RowOptions, reader: Reader) -> Iterator[Located]:
    """The rows of one file; lines that are not rows go through ``reader.refuse``.

    Raises:
        BadRecord: the file as a whole cannot be read (65).
    """
    if path == "-" or path.endswith(STREAM_SUFFIXES):
        yield from reader.located()
        return
    suffix = Path(path).suffix
    if suffix in TABLES:
        yield from _table(path, TABLES[suffix], reader)
    elif suffix == ".json":
        yield from _json(path, options, reader)
    else:
        yield from _text(path, options.text_unit)


def _decoded(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte-order mark."""
    with open(path, "rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                byte = f"not UTF-8: byte 0x{raw[exc.start]:02x} at byte {exc.start + 1}"
                raise BadRecord(f"{path}:{number}", byte) from exc


def _table(path: str, delimiter: str, reader: Reader) -> Iterator[Located]:
    csv.field_size_limit(1 << 30)
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    table = csv.reader(_decoded(path), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    started = 1
    try:
        for cells in table:
            line, started = started, table.line_num + 1
            if not cells:
                continue
            if header is None and cells[0].startswith("# "):
                continue  # a comment before the header
            if header is None:
                header = _checked_header(path, cells)
                continue
            located = Located(dict(zip(header, cells)), path, line)
            if len(cells) != len(header):
                reader.refuse(located, f"has {len(cells)} cells, the header has {len(header)}")
                continue
            yield located
    except csv.Error as exc:
        raise BadRecord(f"{path}:{started}", f"not {'CSV' if delimiter == ',' else 'TSV'}: {exc}") from exc


def _checked_header(path: str, cells: list[str]) -> list[str]:
    twice = sorted({c for c in cells if cells.count(c) > 1})
    if twice:
        raise BadRecord(f"{path}:1", f"the header names {twice[0]!r} twice")
    return cells


def _text(path: str, unit: str) -> Iterator[Located]:
    if unit == "file":
        yield Located({"text": "".join(_decoded(path))}, path, 1)
        return
    held: list[str] = []
    started = 1
    for number, line in enumerate(_decoded(path), 1):
        if unit == "line":
            if line.strip():
                yield Located({"text": line.strip()}, path, number)
            continue
        if line.strip():
            started = started if held else number
            held.append(line.rstrip("\r\n"))
        elif held:
            yield Located({"text": "\n".join(held)}, path, started)
            held = []
    if held:
        yield Located({"text": "\n".join(held)}, path, started)


def _json(path: str, options: RowOptions, reader: Reader) -> Iterator[Located]:
    text = "".join(_decoded(path))
    try:
        start = _skip(text, 0)
        if start == len(text):
            return
        if text[start] == "{":
            start = _array_in_object(text, start, options.records_key, path)
        elif text[start] != "[":
            raise BadRecord(f"{path}:1", "must be an array or an object with one")
        yield from _elements(text, start, path, reader)
    except json.JSONDecodeError as exc:
        cut = "; the file seems cut off" if exc.pos >= len(text.rstrip()) or "Unterminated" in exc.msg else ""
        raise BadRecord(f"{path}:{exc.lineno}", f"not JSON: {exc.msg} at column {exc.colno}{cut}") from exc
    except RecursionError as exc:
        raise BadRecord(f"{path}:1", "not JSON: nested too deeply") from exc


def _elements(text: str, start: int, path: str, reader: Reader) -> Iterator[Located]:
    """The elements of the array at ``start``, each with its line."""
    position = _skip(text, start + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        value, end = _DECODER.raw_decode(text, position)
        if isinstance(value, dict):
            yield Located(value, path, line)
        else:
            reader.refuse(Located({}, path, line), "must be a JSON object", text[position:end].encode())
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _array_in_object(text: str, start: int, key: str | None, path: str) -> int:
    """Where the array of rows starts in the object at ``start``."""
    members = dict(_members(text, start))
    if key is None:
        arrays = [k for k, at in members.items() if text[at] == "["]
        if len(arrays) != 1:
            raise ToolError(
                f"{path}: an object with {len(arrays)} arrays ({', '.join(arrays or members)}); "
                "name the one with the rows by --records-key"
            )
        return members[arrays[0]]
    head, _, rest = key.partition(".")
    if head not in members:
        raise ToolError(
            f"{path}: --records-key: no {head!r}{nearest(head, members)}; has {', '.join(members)}"
        )
    at = members[head]
    if rest and text[at] == "{":
        return _array_in_object(text, at, rest, path)
    if rest or text[at] != "[":
        raise ToolError(f"{path}: --records-key: {head!r} is no array")
    return at


def _members(text: str, start: int) -> Iterator[tuple[str, int]]:
    """The keys of the object at ``start`` and where their values start."""
    position = _skip(text, start + 1)
    while text[position : position + 1] != "}":
        key, end = _DECODER.raw_decode(text, position)
        position = _skip(text, end)
        if not isinstance(key, str) or text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting a key and ':'", text, position)
        position = _skip(text, position + 1)
        yield key, position
        _, end = _DECODER.raw_decode(text, position)
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "}":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def _skip(text: str, position: int) -> int:
    match = WHITESPACE.match(text, position)
    return match.end() if match else position


def hub_rows(dataset: Any, shown: str) -> Iterator[Located]:
    """The rows of a loaded Hub split."""
    for number, row in enumerate(dataset, 1):
        record: Record = dict(row)
        yield Located(record, shown, number)
