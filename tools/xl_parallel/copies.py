"""Texts that are the same, or nearly: what ``filter`` drops and ``split`` keeps together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.neardup import band_keys, buckets, jaccard
from tuneutils.tools.xl_parallel.hashed import U64, grams

Ints = NDArray[np.int64]

#: Length of the character n-grams compared, those over spaces left out.
SIZE = 4
_DIGITS = re.compile(r"\d+")
_MARKS = re.compile(r"[\W_]+")
_BATCH = 4096


def skeleton(text: str) -> str:
    """Lower case, every number 0, no marks: texts of one skeleton are copies. Of marks alone, the text."""
    return _MARKS.sub(" ", _DIGITS.sub("0", text.lower())).strip() or text


def shingles(texts: Sequence[str]) -> list[U64]:
    """The sorted hashes of each text's character n-grams; of one too short for any, none."""
    made: list[U64] = []
    for start in range(0, len(texts), _BATCH):
        some = texts[start : start + _BATCH]
        rows, found = grams(some, (SIZE,))
        order = np.lexsort((found, rows))
        rows, found = rows[order], found[order]
        first = np.ones(len(found), bool)
        first[1:] = (rows[1:] != rows[:-1]) | (found[1:] != found[:-1])
        rows, found = rows[first], found[first]
        bounds = np.searchsorted(rows, np.arange(len(some) + 1))
        made += [found[a:b] for a, b in pairwise(bounds.tolist())]
    return made


def signatures(sets: Sequence[U64]) -> U64:
    """The MinHash band keys of each set; see ``shared/neardup``."""
    bounds = np.cumsum([0, *(len(s) for s in sets)])
    return band_keys(np.concatenate([*sets, np.zeros(0, np.uint64)]), bounds)


class Groups:
    """Union of things by number, each named by its smallest (Tarjan 1975, with path halving)."""

    def __init__(self, size: int) -> None:
        self.parent = list(range(size))

    def find(self, item: int) -> int:
        while self.parent[item] != item:
            self.parent[item] = self.parent[self.parent[item]]
            item = self.parent[item]
        return item

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)


def join_copies(texts: Sequence[str], owners: Groups, threshold: float) -> None:
    """Put together what has texts of one skeleton, or texts at least ``threshold`` similar.

    Args:
        texts: ``texts[i]`` is of owner i.
        threshold: of the Jaccard similarity; 1 joins copies alone. MinHash finds a pair of
            similarity .8 with probability .998.
    """
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        owners.join(first.setdefault(skeleton(text), number), number)
    if threshold >= 1:
        return
    distinct = list(first.values())
    sets = shingles(list(first))
    for _, members in buckets(signatures(sets)):
        _join_similar(members.tolist(), sets, [distinct[i] for i in members.tolist()], owners, threshold)


def _join_similar(
    members: Sequence[int], sets: Sequence[U64], names: Sequence[int], owners: Groups, threshold: float
) -> None:
    """Join the members of a bucket that are similar; those together already are not compared.

    Args:
        names: what each member is among ``owners``.
    """
    parts: dict[int, list[int]] = {}
    for member, name in zip(members, names):
        for root, others in parts.items():
            if root != owners.find(name) and any(
                jaccard(sets[member], sets[other]) >= threshold for other in others
            ):
                owners.join(name, root)
        together = owners.find(name)
        joined = [parts.pop(root) for root in list(parts) if owners.find(root) == together]
        largest: list[int] = max(joined, key=len, default=[])
        for others in joined:
            if others is not largest:
                largest += others
        largest.append(member)
        parts[together] = largest
