"""Markdown in which no value can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&])")


def text(value: Any) -> str:
    """A value as plain inline text."""
    return SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def code(value: Any) -> str:
    """A value as a code span that is safe in a table too."""
    shown = " ".join(str(value).split()).replace("|", "\\|")
    if not shown:
        return "(empty)"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def fenced(value: str, language: str = "") -> str:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`{3,}", value)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{value.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are already Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def link(label: str, url: str) -> str:
    return f"[{text(label)}]({url})"


def number(value: Any) -> str:
    """Whole numbers with thousands separators, others with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return text("yes" if value is True else "no" if value is False else value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def size(count: int) -> str:
    """Bytes for people: ``538.1 MB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count:,} B" if unit == "B" else f"{value:.1f} {unit}"
