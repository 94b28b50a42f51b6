"""The text of a record: its format's fields, without fenced code, whose identifiers name nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import FORMATS, check, parse_line

Record = dict[str, Any]
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_TEXT_FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "src", "tgt")


def text_of(record: Record, fields: Sequence[str] = ()) -> str:
    """The record's text: of ``fields``, or of all that its format has; chat messages without their roles.

    Raises:
        ValueError: no format fits, a field is wrong, or the record has none of ``fields``.
    """
    if len(record) == 1 and not fields:
        text = record.get("text")
        if type(text) is str and text.isascii() and text.strip():
            return _without_code(text)
    found = FORMATS[check(record, tuple(FORMATS))]
    wanted = [f for f in (fields or found) if f in record and f in _TEXT_FIELDS]
    if not wanted:
        raise ValueError(f"has none of the fields {', '.join(fields)}; has {', '.join(sorted(record))}")
    return _without_code("\n".join(s for f in wanted for s in _strings(record[f])))


def _without_code(text: str) -> str:
    return _FENCED.sub(" ", text) if "```" in text else text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (m["content"] for m in value)


def parse_block(block: Sequence[tuple[int, bytes | Record]]) -> list[Record] | None:
    """The records of some lines by one call of the JSON parser; None when a line is not plain JSON."""
    if any(isinstance(raw, dict) for _, raw in block):
        return None
    joined = b"[" + b",".join(raw for _, raw in block) + b"]"  # type: ignore[misc]
    try:
        records = json.loads(joined.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    fits = len(records) == len(block) and all(type(r) is dict for r in records)
    return records if fits else None


def parse_one(raw: bytes | Record) -> Record:
    """One line, or a row of Parquet.

    Raises:
        ValueError: what is wrong with it.
    """
    return raw if isinstance(raw, dict) else parse_line(raw)


def _refuse(name: str) -> Any:
    raise ValueError(name)


def check_fields(fields: Sequence[str]) -> None:
    """Refuse names that no format has."""
    for name in fields:
        if name not in _TEXT_FIELDS:
            raise ToolError(
                f"--field {name}: no field of text; there are {', '.join(_TEXT_FIELDS)}", code=ExitCode.USAGE
            )
