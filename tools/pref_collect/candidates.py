"""Candidate records → what is shown to raters, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneutils.shared.errors import ToolError, nearest
from tuneutils.shared.records import Reader, Record, check_messages

#: The fields that hold completions, in the order A, B.
PAIRS = (("completion_a", "completion_b"), ("chosen", "rejected"))
GOLD = ("a", "b", "tie", "both-bad")
POINTS = range(1, 8)


@dataclass(frozen=True)
class Candidate:
    """One item to be rated.

    Attributes:
        content: ``prompt``, ``a`` and, to compare, ``b``: text or messages.
        extra: the record's other fields.
    """

    key: str
    content: dict[str, Any]
    gold: str | None = None
    extra: Record = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return "compare" if "b" in self.content else "rate"


def read_candidates(reader: Reader, mode: str) -> list[Candidate]:
    """All candidates of a stream, in its order.

    Args:
        mode: ``compare``, ``rate`` or ``auto``, which takes that of the first record.

    Raises:
        ToolError: a record is none, is of the other mode, or comes twice (by the reader's ``on_error``).
    """
    found: list[Candidate] = []
    places: dict[str, str] = {}
    for located in reader.located():
        try:
            candidate = candidate_of(located.record)
            if mode == "auto":
                mode = candidate.mode
            if mode == "rate" and candidate.mode == "compare":
                raise ValueError("has two completions; this study rates one")
            if mode == "compare" and candidate.mode == "rate":
                raise ValueError("has one completion; this study compares two")
            if candidate.key in places:
                raise ValueError(f"the same item as {places[candidate.key]} (id {candidate.key!r})")
        except ValueError as exc:
            reader.refuse(located, str(exc))
            continue
        places[candidate.key] = located.place
        found.append(candidate)
    if not found:
        raise ToolError(f"{', '.join(reader.paths)}: no usable candidates")
    return found


def candidate_of(record: Record) -> Candidate:
    """The candidate in a record.

    Raises:
        ValueError: with the field and the reason.
    """
    pair = next((p for p in PAIRS if all(f in record for f in p)), None)
    fields = pair or (("completion",) if "completion" in record else ())
    if "prompt" not in record or not fields:
        wanted = "prompt+completion_a+completion_b, prompt+chosen+rejected or prompt+completion"
        names = ("prompt", "completion_a", "completion_b")
        hint = "".join(nearest(k, names) for k in record if k not in names)
        raise ValueError(f"needs the fields {wanted}; has {', '.join(sorted(record)) or 'none'}{hint}")
    for name in ("prompt", *fields):
        _check_text(name, record[name])
    content = {"prompt": record["prompt"], **{k: record[f] for k, f in zip("ab", fields, strict=False)}}
    if pair and content["a"] == content["b"]:
        raise ValueError(f"{pair[0]} and {pair[1]} are the same: nothing to compare")
    extra = {k: v for k, v in record.items() if k not in ("prompt", "id", "gold", *fields)}
    return Candidate(_key(record, content), content, _gold(record, bool(pair)), extra)


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, list):
        check_messages(name, value)
    elif not isinstance(value, str):
        raise ValueError(f"field {name!r}: must be a string or a list of messages")
    elif not value.strip() and name != "prompt":
        raise ValueError(f"field {name!r}: is empty")


def _key(record: Record, content: dict[str, Any]) -> str:
    given = record.get("id")
    if given is None:
        return hashlib.sha256(_canonical(content)).hexdigest()[:16]
    if not isinstance(given, (str, int)) or isinstance(given, bool) or not 0 < len(str(given)) <= 64:
        raise ValueError("field 'id': must be a string of 1 to 64 characters, or an integer")
    return str(given)


def _gold(record: Record, compares: bool) -> str | None:
    value = record.get("gold")
    if value is None:
        return None
    if compares and value not in GOLD:
        raise ValueError(f"field 'gold': must be one of {', '.join(GOLD)}")
    if not compares and (value not in POINTS or isinstance(value, bool)):
        raise ValueError("field 'gold': must be an integer from 1 to 7")
    return str(value)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def items_digest(candidates: Sequence[Candidate]) -> str:
    """SHA-256 over the candidates as raters see them, with ids and gold."""
    lines = [_canonical([c.key, c.content, c.gold]) for c in candidates]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def as_text(value: str | list[dict[str, Any]]) -> str:
    """A prompt or completion as one text."""
    return value if isinstance(value, str) else "\n\n".join(str(m["content"]) for m in value)
