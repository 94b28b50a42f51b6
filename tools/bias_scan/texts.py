"""The text of a record: its format's fields, without code, whose identifiers name nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.records import FORMATS, check, format_of, parse_line

Record = dict[str, Any]
#: Fenced blocks to their end or the text's, and code within a line.
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
TEXT_FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "src", "tgt")


def text_of(record: Record, fields: Sequence[str] = ()) -> str:
    """The record's text: of ``fields``, or of all that its format has; chat messages without their roles.

    Raises:
        ValueError: no format fits, a field is wrong, or the record has none of ``fields``.
    """
    found = FORMATS[check(record, tuple(FORMATS))]
    wanted = [f for f in (fields or found) if f in record and f in TEXT_FIELDS]
    if not wanted:
        raise ValueError(f"has none of the fields {', '.join(fields)}; has {', '.join(sorted(record))}")
    return _without_code("\n".join(s for f in wanted for s in _strings(record[f])))


def _without_code(text: str) -> str:
    return _CODE.sub(" ", text) if "`" in text else text


def _quick_text(record: Record, fields: tuple[str, ...]) -> str | None:
    """As :func:`text_of`, for a record whose fields are all plain strings; None for others."""
    values = [record[name] for name in _fields_by_keys(tuple(record), fields)]
    try:
        text = "\n".join(values)
        if not text.isascii():
            text.encode("utf-8")
    except (TypeError, UnicodeEncodeError):
        return None
    for value in values:
        if not value or value.isspace():
            return None
    return _without_code(text) if values else None


@lru_cache(maxsize=1024)
def _fields_by_keys(keys: tuple[str, ...], fields: tuple[str, ...]) -> tuple[str, ...]:
    """The fields to read of records with these keys; none where :func:`check` asks for more than strings."""
    found = format_of(dict.fromkeys(keys))
    if found is None or fields or not set(FORMATS[found]) <= set(TEXT_FIELDS):
        return ()
    return FORMATS[found]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (m["content"] for m in value)


def parse_lines(lines: Sequence[bytes]) -> list[Record] | None:
    """The records of lines by one call of the JSON parser; None when a line is not plain JSON."""
    try:
        joined = b"[" + b",".join(lines) + b"]"
        records = json.loads(joined.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    fits = len(records) == len(lines) and all(type(r) is dict for r in records)
    return records if fits else None


def texts_of(
    lines: Sequence[bytes], fields: tuple[str, ...]
) -> tuple[list[str], list[int], list[tuple[int, str]]]:
    """The texts of lines with the lines' indices, and for what is no record its index and the reason."""
    records = parse_lines(lines)
    if records is not None:
        try:
            texts = [_quick_text(r, fields) or text_of(r, fields) for r in records]
            return texts, list(range(len(lines))), []
        except ValueError:
            pass
    texts, kept, refused = [], [], []
    for i, line in enumerate(lines):
        try:
            texts.append(text_of(parse_line(line), fields))
            kept.append(i)
        except ValueError as exc:
            refused.append((i, str(exc)))
    return texts, kept, refused


def _refuse(name: str) -> Any:
    raise ValueError(name)


def check_fields(fields: Sequence[str]) -> None:
    """Refuse names that no format has."""
    for name in fields:
        if name not in TEXT_FIELDS:
            raise ToolError(
                f"--field {name}: no field of text{nearest(name, TEXT_FIELDS)}; {', '.join(TEXT_FIELDS)} are",
                code=ExitCode.USAGE,
            )
