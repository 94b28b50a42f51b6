"""Words of many texts at once, as 64-bit hashes in arrays, and hashes of their n-grams.

A word's hash is the polynomial sum of mix(c_j) · P^j over its characters, in the integers modulo 2^64;
P is odd, so that it has an inverse there, and the sum over any stretch follows from one pass over
all characters. Every step below is a pass over an array: no Python code runs per word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.neardup import mix

U64 = NDArray[np.uint64]
Index = NDArray[np.int64]

SPACE, WORD, PUNCTUATION, LETTER = 0, 1, 2, 3
_BASE = 0x9E3779B97F4A7C15 | 1
_GRAM_BASE = 0xD1342543DE82EF95
_MASK = (1 << 64) - 1


@cache
def _character_classes() -> NDArray[np.uint8]:
    """Class of every code point as Python's ``\\w`` and ``\\s`` have it, letters apart."""
    everything = "".join(map(chr, range(0x110000)))
    classes = np.full(0x110000, PUNCTUATION, np.uint8)
    for pattern, kind in ((r"\s+", SPACE), (r"\w+", WORD), (r"[^\W\d_]+", LETTER)):
        for match in re.finditer(pattern, everything):
            classes[match.start() : match.end()] = kind
    return classes


@cache
def _character_codes() -> U64:
    return mix(np.arange(0x110000, dtype=np.uint64))


class _Powers:
    """``base^i`` and ``base^-i`` modulo 2^64, grown as needed."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.up = self.down = np.ones(0, np.uint64)

    def upto(self, count: int) -> tuple[U64, U64]:
        if len(self.up) < count:
            size = 1 << (count - 1).bit_length()
            self.up = _powers(self.base, size)
            self.down = _powers(pow(self.base, -1, 1 << 64), size)
        return self.up[:count], self.down[:count]


def _powers(base: int, count: int) -> U64:
    factors = np.full(count, base & _MASK, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_CHARACTER_POWERS = _Powers(_BASE)
_GRAM_POWERS = _Powers(_GRAM_BASE)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of texts.

    Attributes:
        hashes: ``(n,)``, one for each token.
        start, end: ``(n,)`` where each token lies in its own text, in characters.
        kind: ``(n,)`` ``WORD`` or ``PUNCTUATION``.
        alphabetic: ``(n,)`` whether each has a letter.
        bounds: ``(texts + 1,)``: the tokens of text i are ``bounds[i]:bounds[i + 1]``.
    """

    hashes: U64
    start: Index
    end: Index
    kind: NDArray[np.uint8]
    alphabetic: NDArray[np.bool_]
    bounds: Index

    def words(self) -> Tokens:
        """Only the words."""
        keep = self.kind == WORD
        before = np.concatenate([[0], np.cumsum(keep)])
        columns = (self.hashes, self.start, self.end, self.kind, self.alphabetic)
        return Tokens(*(column[keep] for column in columns), before[self.bounds])


def tokenize(texts: Sequence[str], *, spaces_only: bool = False) -> Tokens:
    r"""Lower-cased tokens ``\w+|[^\w\s]+`` (NLTK's WordPunct), or runs of non-spaces with ``spaces_only``.

    A few characters whose lower case is two characters stay as they are.
    """
    lowered = [_lower(t) for t in texts]
    joined = "\n".join([*lowered, ""])
    if joined.isascii():
        characters: NDArray[np.generic] = np.frombuffer(joined.encode("ascii"), np.uint8)
    else:
        characters = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    classes = _character_classes()[characters]
    letters = classes == LETTER
    classes = np.minimum(classes, WORD) if spaces_only else np.where(letters, np.uint8(WORD), classes)
    bounds = np.flatnonzero(classes[1:] != classes[:-1]) + 1
    bounds = np.concatenate([[0], bounds]) if len(characters) else np.zeros(0, np.int64)
    ends = np.append(bounds[1:], len(characters))
    up, down = _CHARACTER_POWERS.upto(len(characters))
    sums = np.add.reduceat(_character_codes()[characters] * up, bounds) if len(bounds) else up
    alphabetic = np.logical_or.reduceat(letters, bounds) if len(bounds) else letters
    kind = classes[bounds]
    keep = kind != SPACE
    start, end = bounds[keep], ends[keep]
    hashes = mix(sums[keep] * down[start])
    offsets = np.concatenate([[0], np.cumsum([len(t) + 1 for t in lowered], dtype=np.int64)])
    token_bounds = np.searchsorted(start, offsets)
    shift = np.repeat(offsets[:-1], np.diff(token_bounds))
    return Tokens(hashes, start - shift, end - shift, kind[keep], alphabetic[keep], token_bounds)


def _lower(text: str) -> str:
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)


class Windows:
    """The n-grams of a sequence of tokens, for any n: hashes by differences of one running sum."""

    def __init__(self, hashes: U64) -> None:
        up, self._down = _GRAM_POWERS.upto(len(hashes))
        self._sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes * up, dtype=np.uint64)])

    def at(self, first: Index, size: int) -> U64:
        """Hashes, their order included, of the ``size`` tokens from each of ``first``; not yet mixed."""
        return (self._sums[first + size] - self._sums[first]) * self._down[first]

    def every(self, size: int) -> U64:
        """``(n - size + 1,)``: the same from each token on."""
        count = max(len(self._down) - size + 1, 0)
        return (self._sums[size:] - self._sums[:-size])[:count] * self._down[:count]


def window_hashes(hashes: U64, size: int) -> U64:
    """``(n - size + 1,)``: a hash of each ``size`` consecutive tokens, order included."""
    return mix(Windows(hashes).every(size)) if len(hashes) >= size else np.zeros(0, np.uint64)


def text_of_each(bounds: Index) -> Index:
    """The number of the text that each token is in."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))


def starts_within(bounds: Index, size: int) -> Index:
    """The tokens from which ``size`` tokens lie within one text."""
    text = text_of_each(bounds)
    return np.flatnonzero(text[: max(len(text) - size + 1, 0)] == text[size - 1 :])


def windows(tokens: Tokens, size: int) -> tuple[U64, Index]:
    """Hashes of the n-grams that lie within one text, and the index of each one's first token."""
    inside = starts_within(tokens.bounds, size)
    return window_hashes(tokens.hashes, size)[inside], inside


def shingles(tokens: Tokens, size: int) -> tuple[U64, Index]:
    """Word n-grams by text: hashes and bounds as in ``Tokens``; a shorter text is one shingle.

    A text without words has none.
    """
    grams, first = windows(tokens, size)
    counts = np.diff(tokens.bounds)
    short = np.flatnonzero((counts > 0) & (counts < size))
    if len(short):
        whole = [_whole(tokens.hashes[tokens.bounds[i] : tokens.bounds[i + 1]]) for i in short]
        grams = np.concatenate([grams, np.array(whole, np.uint64)])
        first = np.concatenate([first, tokens.bounds[short]])
        order = np.argsort(first, kind="stable")
        grams, first = grams[order], first[order]
    return grams, np.searchsorted(first, tokens.bounds)


def _whole(hashes: U64) -> np.uint64:
    return window_hashes(hashes, len(hashes))[0]
