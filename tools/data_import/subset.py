"""Subsets and splits by hash: the same for a record whatever stands around it and in whatever order."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Sequence
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Record


def digest(value: Any, *salt: object) -> bytes:
    """SHA-256 of a value's canonical JSON, with a salt."""
    text = json.dumps([*salt, value], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def smallest(records: Sequence[Record], number: int, seed: int) -> list[Record]:
    """A random sample: the ``number`` records with the smallest hashes, in the order that they came."""
    chosen = heapq.nsmallest(
        number, range(len(records)), key=lambda i: (digest(records[i], seed, "sample"), i)
    )
    return [records[i] for i in sorted(chosen)]


def parse_split(text: str) -> tuple[tuple[str, float], ...]:
    """``train=0.9,test=0.1`` → pairs whose shares add up to 1.

    Raises:
        ToolError: it does not parse, a name comes twice, or the sum is not 1 (2).
    """
    pairs = []
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not name.isidentifier() or not 0 < value <= 1:
            raise ToolError(f"--split {part!r}: write NAME=SHARE with 0 < SHARE <= 1", code=ExitCode.USAGE)
        pairs.append((name, value))
    total = sum(share for _, share in pairs)
    if abs(total - 1) > 1e-6:
        raise ToolError(f"--split {text!r}: the shares add up to {total:g}, not 1", code=ExitCode.USAGE)
    if len({name for name, _ in pairs}) != len(pairs):
        raise ToolError(f"--split {text!r}: a name comes twice", code=ExitCode.USAGE)
    return tuple(pairs)


def side_of(record: Record, shares: Sequence[tuple[str, float]], seed: int) -> str:
    """The side that the record's prompt falls on; equal prompts always fall on the same."""
    point = int.from_bytes(digest(split_key(record), seed, "split")[:8]) / 2**64
    edge = 0.0
    for name, share in shares:
        edge += share
        if point < edge:
            return name
    return shares[-1][0]


def split_key(record: Record) -> str:
    """What may not stand on two sides: the prompt, the source text, or the text itself.

    Case and white space do not count. In a conversation it is all up to the first assistant's turn, so
    that longer and shorter versions of one conversation stay together.
    """
    value = next((record[k] for k in ("prompt", "messages", "src", "text", "chosen") if k in record), record)
    if isinstance(value, list):
        opening = []
        for turn in value:
            if turn["role"] == "assistant":
                break
            if turn["role"] != "system":
                opening.append(turn["content"])
        value = "\n".join(opening)
    return " ".join(str(value).split()).casefold()
