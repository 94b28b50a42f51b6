"""A text being rewritten: its words, what replaces them, and the text that comes of it."""

from __future__ import annotations

from typing import NamedTuple

from tuneutils.tools.cf_augment.articles import article
from tuneutils.tools.cf_augment.scan import starts
from tuneutils.tools.cf_augment.words import cased_like, join, split


class Edit(NamedTuple):
    """Words ``start`` to ``end`` (exclusive) become ``new``."""

    start: int
    end: int
    new: str


class Text:
    """A text as words and separators: ``seps[0] + words[0] + seps[1] + ...``."""

    __slots__ = ("seps", "source", "words")

    def __init__(self, source: str) -> None:
        self.source = source
        self.words, self.seps = split(source)

    def written(self, edits: list[Edit]) -> str:
        """The text with ``edits`` made."""
        words, seps = self.words.copy(), self.seps
        for start, end, new in edits:
            words[start] = new
            if end > start + 1:
                if seps is self.seps:
                    seps = seps.copy()
                for k in range(start + 1, end):
                    words[k] = seps[k] = ""
        return join(words, seps)

    def characters(self, edits: list[Edit]) -> list[tuple[int, int, str]]:
        """The edits in characters, from left to right."""
        at = starts(self.words, self.seps)
        return [(at[e.start], at[e.end - 1] + len(self.words[e.end - 1]), e.new) for e in sorted(edits)]

    def with_articles(self, edits: list[Edit]) -> list[Edit]:
        """The edits, and *a* or *an* before words that now begin with another sound."""
        more = []
        for start, _, new in edits:
            before = start - 1
            if before < 0:
                continue
            old = self.words[before]
            if len(old) > 2 or old.lower() not in ("a", "an") or self.seps[start] != " ":
                continue
            right = article(new)
            if article(self.words[start]) != right:
                more.append(Edit(before, start, right.capitalize() if old == "A" else cased_like(right, old)))
        return edits + more if more else edits
