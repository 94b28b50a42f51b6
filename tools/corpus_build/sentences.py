"""Sentences of a text and words of a sentence, by punctuation alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

_END = re.compile(r"(?<=[.!?])[\"”’)\]]*\s+(?=[\"“‘(\[]*[A-Z0-9])")
_ABBREVIATED = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|No|Nos|vs|v|Inc|Co|Corp|Ltd|e\.g|i\.e|cf|al|Fig|Eq|Sec|Art|Jan|Feb|Mar|Apr|Jun|"
    r"Jul|Aug|Sept?|Oct|Nov|Dec|[A-Z])|\b(?:[A-Za-z]\.){1,3}[A-Za-z])\.\Z"
)
_MARKUP = re.compile(r"[`{}<>|\\=_~^]|::|https?:|\*\*|\.\.\s")
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of prose, each on one line; headings, lists, tables, code and markup are left out."""
    for raw in re.split(r"\n\s*\n", text):
        if raw[:1] in " \t*-#|>.:" or _MARKUP.search(raw):
            continue
        joined = " ".join(raw.split())
        if joined.endswith((".", "!", "?", '"', "”", ")")) and len(joined) >= 40:
            yield joined


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences; a full stop after an abbreviation ends none."""
    made: list[str] = []
    start = 0
    for match in _END.finditer(paragraph):
        piece = paragraph[start : match.start()]
        if not _ABBREVIATED.search(piece):
            made.append(paragraph[start : match.end()].strip())
            start = match.end()
    rest = paragraph[start:].strip()
    return [*made, rest] if rest else made
