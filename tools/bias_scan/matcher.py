"""Mentions of groups in a batch of texts: tokens by ``bytes.split``, terms by Aho-Corasick.

A batch is one byte string: case folded, punctuation turned to spaces, a separator token between texts. Terms
are looked up with a space on either side, so only whole words match, phrases as well as single words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.lexicons import NO_GROUP, Lexicon

Ints = NDArray[np.int64]
SEPARATOR = b"\x00"
_JOINT = " \x00 "
_WORD = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_\x00") | set(range(128, 256))
_TABLE = bytes(i + 32 if 65 <= i <= 90 else i if i in _WORD else 32 for i in range(256))
#: What is no letter beyond ASCII: Latin-1 signs, general and CJK punctuation, arrows to dingbats, emoji.
_MARKS = re.compile("[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u2000-\u206f\u2190-\u2bff"
                    "\u3000-\u303f\uff00-\uff0f\U0001f000-\U0001faff]")  # fmt: skip


@dataclass(frozen=True)
class Mentions:
    """The mentions in a batch of ``n`` texts, and its tokens.

    Attributes:
        tokens: all words, a separator before the first text and after each.
        row_of: ``(tokens,)`` the text of each token; of a separator the text before it.
        start: ``(mentions,)`` index of the mention's first token.
        length: ``(mentions,)`` its number of tokens.
        group: ``(mentions,)`` its group, as an index into :attr:`Matcher.groups`.
        ambiguous: for each axis, hits of terms that are ordinary words as well; no mentions.
    """

    n: int
    tokens: list[bytes]
    row_of: Ints
    start: Ints
    length: Ints
    group: Ints
    ambiguous: Ints


@dataclass
class _Pattern:
    """What a text of the lexicons stands for: parallel lists, one entry for each axis that has it."""

    axes: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    capital: list[bool] = field(default_factory=list)
    word: list[bool] = field(default_factory=list)


class Matcher:
    """Finds the terms of lexicons; ``groups`` numbers all groups of all axes in one row.

    Attributes:
        axes: names of the lexicons.
        groups: ``(axis index, group)`` of each group.
    """

    def __init__(self, lexicons: Sequence[Lexicon]) -> None:
        self.axes = [lexicon.name for lexicon in lexicons]
        self.groups: list[tuple[int, str]] = [
            (axis, group) for axis, lexicon in enumerate(lexicons) for group in lexicon.groups
        ]
        self.terms: list[str] = []
        patterns: dict[str, _Pattern] = {}
        number = {key: i for i, key in enumerate(self.groups)}
        for axis, lexicon in enumerate(lexicons):
            seen: set[str] = set()
            for term in lexicon.terms:
                key = _key(term.text)
                if not key.strip() or key in seen:
                    continue
                seen.add(key)
                pattern = patterns.setdefault(key, _Pattern())
                pattern.axes.append(axis)
                pattern.groups.append(-1 if term.group == NO_GROUP else number[axis, term.group])
                pattern.capital.append("capital" in term.flags)
                pattern.word.append(bool(term.flags & {"word", "place"}))
        self._build(patterns)

    def _build(self, patterns: dict[str, _Pattern]) -> None:
        import ahocorasick

        found: Any = ahocorasick.Automaton()
        columns: list[list[Any]] = [[], [], [], [], []]
        offsets = [0]
        for number, (key, pattern) in enumerate(patterns.items()):
            found.add_word(key, number)
            size = [key.count(" ") - 1] * len(pattern.axes)
            for column, values in zip(
                columns, (pattern.axes, pattern.groups, pattern.capital, pattern.word, size)
            ):
                column += values
            offsets.append(len(columns[0]))
        found.make_automaton()
        self._automaton = found
        self._axis, self._group, self._size = (np.array(columns[i], dtype=np.int64) for i in (0, 1, 4))
        self._capital, self._word = (np.array(columns[i], dtype=bool) for i in (2, 3))
        self._offsets = np.array(offsets, dtype=np.int64)
        self._bytes = np.array([len(key) for key in patterns], dtype=np.int64)

    @property
    def group_axis(self) -> Ints:
        """``(groups,)`` the axis of each group."""
        return np.array([axis for axis, _ in self.groups], dtype=np.int64)

    def find(self, texts: Sequence[str]) -> Mentions:
        """The mentions of a batch. Of overlapping terms of one axis the longer stands."""
        raw, plain = _prepare(texts)
        tokens = plain.split()
        letters = np.frombuffer(plain, dtype=np.uint8)
        spaces = letters == 32
        starts = np.flatnonzero(spaces[:-1] & ~spaces[1:]) + 1
        row_of = np.cumsum(letters[starts] == 0) - 1
        hits = list(self._automaton.iter(plain.decode("latin-1")))
        ends, numbers = np.array(hits, dtype=np.int64).reshape(-1, 2).T
        first = ends - self._bytes[numbers] + 2
        which, entry = _expanded(self._offsets, numbers)
        upper = np.frombuffer(raw, dtype=np.uint8)
        cased = (upper[first] != letters[first]) | (
            (letters[first] >= 128) & (upper[first + 1] != letters[first + 1])
        )
        kept = (cased[which] | ~self._capital[entry]) & self._longest(which, entry, first, ends)
        which, entry = which[kept], entry[kept]
        unclear = self._word[entry]
        ambiguous = np.bincount(self._axis[entry[unclear]], minlength=len(self.axes))
        named = ~unclear & (self._group[entry] >= 0)
        which, entry = which[named], entry[named]
        start = np.searchsorted(starts, first[which])
        return Mentions(len(texts), tokens, row_of, start, self._size[entry], self._group[entry], ambiguous)

    def _longest(self, which: Ints, entry: Ints, first: Ints, ends: Ints) -> NDArray[np.bool_]:
        """Which hits lie inside no other of the same axis."""
        axis, start, end = self._axis[entry], first[which], ends[which]
        order = np.lexsort((-end, start, axis))
        apart = (int(end.max()) + 2 if len(end) else 1) * axis[order]
        reached = np.maximum.accumulate(end[order] + apart)
        kept = np.ones(len(order), dtype=bool)
        kept[order[1:]] = (end[order] + apart)[1:] > reached[:-1]
        return kept


def _expanded(offsets: Ints, numbers: Ints) -> tuple[Ints, Ints]:
    """For hits of patterns: the hit's index and the entry's, one for each axis that has the pattern."""
    counts = offsets[numbers + 1] - offsets[numbers]
    which = np.repeat(np.arange(len(numbers)), counts)
    before = np.cumsum(counts) - counts
    return which, np.arange(len(which)) - before[which] + offsets[numbers][which]


def _prepare(texts: Sequence[str]) -> tuple[bytes, bytes]:
    """The batch as it is and in lower case without punctuation, equally long."""
    joined = _JOINT + _JOINT.join(texts) + _JOINT
    if joined.count("\x00") != len(texts) + 1:
        joined = _JOINT + _JOINT.join(t.replace("\x00", " ") for t in texts) + _JOINT
    if joined.isascii():
        raw = joined.encode("ascii")
        return raw, raw.translate(_TABLE)
    joined = _MARKS.sub(" ", joined)
    raw = joined.encode("utf-8")
    lower = joined.lower().encode("utf-8")
    if len(lower) != len(raw):  # such as the Turkish capital i with its dot, which becomes two letters
        lower = "".join(map(_lower_of_same_size, joined)).encode("utf-8")
    return raw, lower.translate(_TABLE)


def _lower_of_same_size(letter: str) -> str:
    lower = letter.lower()
    return lower if len(lower.encode("utf-8")) == len(letter.encode("utf-8")) else letter


def _key(text: str) -> str:
    """A term as it stands in a batch, with a space on either side, one character a byte."""
    _, plain = _prepare([text])
    return " " + " ".join(plain.decode("latin-1").split()[1:-1]) + " "
