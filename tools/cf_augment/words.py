"""Text as words and what stands between them; casing."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

#: Runs of letters: an apostrophe or hyphen is a separator, so that *she's* begins with *she*.
_SPLIT = re.compile(r"([^\W\d_]+)").split
_SPLIT_ASCII = re.compile(r"([A-Za-z]+)").split  # the same for ASCII, in two thirds of the time


def split(text: str) -> tuple[list[str], list[str]]:
    """Words and separators: ``seps[0] + words[0] + seps[1] + ...``, one separator more than words."""
    parts = (_SPLIT_ASCII if text.isascii() else _SPLIT)(text)
    return parts[1::2], parts[::2]


def join(words: list[str], seps: list[str]) -> str:
    parts = [""] * (len(words) + len(seps))
    parts[::2] = seps
    parts[1::2] = words
    return "".join(parts)


def cased_like(new: str, old: str) -> str:
    """``new`` in the casing of ``old``: lower, Title or UPPER; a name keeps its own capitals."""
    if old.islower():
        return new
    if old.isupper() and len(old) > 1:
        return new.upper()
    if old[:1].isupper():
        return new[:1].upper() + new[1:]
    return new


@cache
def _sections() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    text = (Path(__file__).with_name("data") / "words.txt").read_text(encoding="utf-8")
    for part in text.split("\n[")[1:]:
        name, _, words = part.partition("]")
        found[name] = frozenset(words.split())
    return found


def word_set(name: str) -> frozenset[str]:
    """A section of ``data/words.txt``."""
    return _sections()[name]
