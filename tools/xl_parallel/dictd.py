"""Dictionaries of the dictd format (FreeDict): headword and translations, as pairs of words."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from tuneutils.shared.errors import ToolError

_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_NOTE = re.compile(r"\([^)]*\)|\[[^\]]*\]|<[^>]*>|/[^/]*/|\"[^\"]*\"")
#: A longer line is a definition, not a translation.
WORDS = 3
_SENSE = re.compile(r"^\s*\d+[.)]?\s+")


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """Each headword with each of its translations, without notes on grammar and pronunciation.

    Args:
        path: ``NAME.dict`` or ``NAME.dict.dz``; ``NAME.index`` must stand beside it.

    Raises:
        ToolError: the index is absent or does not fit (65).
    """
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    if not index.is_file():
        raise ToolError(f"{path}: no {index.name} beside it; name both with a glob such as {index.stem}.*")
    body = gzip.decompress(path.read_bytes()) if path.suffix == ".dz" else path.read_bytes()
    for number, line in enumerate(index.read_text("utf-8").splitlines(), 1):
        try:
            word, start, size = line.split("\t")[:3]
            at, length = _number(start), _number(size)
        except (ValueError, KeyError) as exc:
            raise ToolError(f"{index}:{number}: not a line of a dictd index") from exc
        if word.startswith("00") or not word.strip():
            continue
        for translation in _translations(body[at : at + length].decode("utf-8", "replace")):
            yield word, translation


def _translations(article: str) -> Iterator[str]:
    """From the lines below the headword; commas and semicolons part synonyms."""
    for line in article.splitlines()[1:]:
        cleaned = _NOTE.sub("", _SENSE.sub("", line))
        if ":" in cleaned or not line.strip():
            continue
        for part in re.split(r"[;,]", cleaned):
            word = part.strip(" .·–-\t0123456789")
            if word and len(word.split()) <= WORDS:
                yield word


def _number(text: str) -> int:
    value = 0
    for digit in text:
        value = value * 64 + _DIGITS[digit]
    return value
