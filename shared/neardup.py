"""Near duplicates: MinHash and banding propose, the exact Jaccard similarity of shingle sets decides.

Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4: of two
texts of similarity s at least one band is equal with probability 1 - (1 - s^ROWS)^BANDS, .998 at s = .8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Index = NDArray[np.int64]

BANDS, ROWS = 12, 4
SIZE = 5  # words a shingle

Sets = Callable[[int], U64]


def mix(values: U64) -> U64:
    """SplitMix64's finaliser: a bijection in which each bit of the input changes half of the output's."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def band_keys(grams: U64, bounds: Index, seed: int = 0) -> U64:
    """``(texts, BANDS)``: a hash of each band of each text's MinHash signature.

    A text without shingles gets keys that no other has.
    """
    texts = len(bounds) - 1
    filled = np.flatnonzero(np.diff(bounds))
    values = (grams >> np.uint64(32)).astype(np.uint32)
    factors, shifts = _permutations(seed)
    keys = mix(np.arange(texts * BANDS, dtype=np.uint64) + np.uint64(seed)).reshape(texts, BANDS)
    if not len(filled):
        return keys
    starts = bounds[:-1][filled]
    moved = np.empty_like(values)
    for band in range(BANDS):
        key = np.full(len(filled), band, np.uint64)
        for row in range(band * ROWS, (band + 1) * ROWS):
            np.multiply(values, factors[row], out=moved)
            np.add(moved, shifts[row], out=moved)
            key = mix(key + np.minimum.reduceat(moved, starts))
        keys[filled, band] = key
    return keys


def _permutations(seed: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    rng = np.random.default_rng(seed)
    size = BANDS * ROWS
    factors = rng.integers(0, 2**31, size, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, rng.integers(0, 2**32, size, dtype=np.uint32)


def jaccard(a: U64, b: U64) -> float:
    """Similarity of two sorted arrays without repeats; 0 where both are empty."""
    if not len(a) or not len(b):
        return 0.0
    if len(a) > len(b):
        a, b = b, a
    at = np.searchsorted(b, a)
    at[at == len(b)] = 0
    common = int(np.count_nonzero(b[at] == a))
    return common / (len(a) + len(b) - common)


def buckets(keys: U64) -> Iterator[tuple[int, Index]]:
    """Each band's groups of two or more texts with the same key, members in order."""
    for band in range(keys.shape[1]):
        order = np.argsort(keys[:, band], kind="stable")
        ordered = keys[order, band]
        edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        for start, end in pairwise(edges):
            if end - start > 1:
                yield band, order[start:end]


def similar_pairs(keys: U64, sets: Sets, threshold: float) -> dict[tuple[int, int], float]:
    """Every pair of texts that shares a band and is at least ``threshold`` similar, with its similarity."""
    found: dict[tuple[int, int], float] = {}
    seen: set[tuple[int, int]] = set()
    for _, members in buckets(keys):
        for i, a in enumerate(members.tolist()):
            for b in members[i + 1 :].tolist():
                if (a, b) not in seen:
                    seen.add((a, b))
                    similarity = jaccard(sets(a), sets(b))
                    if similarity >= threshold:
                        found[a, b] = similarity
    return found


def near_duplicates(keys: U64, sets: Sets, threshold: float) -> dict[int, int]:
    """The texts to drop, each with the earlier, kept text that it is at least ``threshold`` similar to.

    A text is compared only with kept ones, so a thousand copies cost a thousand comparisons, and a
    dropped text is always similar to one that stays.

    Args:
        keys: from ``band_keys``.
        sets: a text's shingles, sorted and without repeats.
    """
    of_text: dict[int, list[int]] = defaultdict(list)
    for number, (_, members) in enumerate(buckets(keys)):
        for member in members.tolist():
            of_text[member].append(number)
    kept: dict[int, list[int]] = defaultdict(list)
    dropped: dict[int, int] = {}
    for text in sorted(of_text):
        mine_in = of_text[text]
        candidates = dict.fromkeys(c for bucket in mine_in for c in kept[bucket])
        mine = sets(text) if candidates else None
        match = next(
            (c for c in candidates if mine is not None and jaccard(mine, sets(c)) >= threshold), None
        )
        if match is not None:
            dropped[text] = match
        else:
            for bucket in mine_in:
                kept[bucket].append(text)
    return dropped
