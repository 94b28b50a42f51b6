"""Hashed n-grams of texts, and a linear score over them: a classifier that is a file of weights.

Character n-grams within lower-cased text (white space is one space) and words with their neighbours are
hashed into buckets (Weinberger et al. 2009, arXiv 0902.2206). An n-gram that comes c times counts 1 + ln c;
each field of a text is scaled to length 1, so that a long one does not drown a short one.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BUCKETS = 1 << 16
SIZES = (2, 3, 4, 5)

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\w+")
_PRIME = np.uint64(0x100000001B3)  # FNV-1a's
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


def features(fields: Mapping[str, str], buckets: int = BUCKETS) -> tuple[Indices, Floats]:
    """Buckets and values of a text's fields; the same n-gram in another field is another feature.

    Returns:
        Ascending bucket numbers within a field and their values, each ``(k,)``.
    """
    indices, values = [], []
    for name, text in fields.items():
        hashed = _hashes(text, zlib.crc32(name.encode())) % np.uint64(buckets)
        if not len(hashed):
            continue
        found, counts = np.unique(hashed.astype(np.int64), return_counts=True)
        weights = 1.0 + np.log(counts)
        indices.append(found)
        values.append(weights / np.linalg.norm(weights))
    if not indices:
        return np.zeros(0, np.int64), np.zeros(0)
    return np.concatenate(indices), np.concatenate(values)


def score(weights: NDArray[np.floating], bias: float, fields: Mapping[str, str]) -> float:
    """``weights`` ``(buckets,)`` times the features of a text, plus ``bias``."""
    indices, values = features(fields, len(weights))
    return float(weights[indices].astype(np.float64) @ values) + bias


def _hashes(text: str, salt: int) -> NDArray[np.uint64]:
    """The 64-bit hashes of a text's n-grams, with repetitions."""
    plain = _SPACE.sub(" ", text.lower()).strip()
    if not plain:
        return np.zeros(0, np.uint64)
    codes = np.frombuffer(f" {plain} ".encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    made = []
    with np.errstate(over="ignore"):
        for size in SIZES:
            if len(codes) < size:
                break
            hashed = np.full(len(codes) - size + 1, salt + size, np.uint64)
            for offset in range(size):
                hashed = (hashed ^ codes[offset : len(codes) - size + 1 + offset]) * _PRIME
            made.append(hashed)
        words = _WORD.findall(plain)
        grams = words + [f"{a} {b}" for a, b in pairwise(words)]
        crcs = [zlib.crc32(g.encode("utf-8", "surrogatepass"), salt) for g in grams]
        made.append(np.array(crcs, np.uint64) * _PRIME)
        joined = np.concatenate(made) * _MIX
    return joined ^ (joined >> np.uint64(32))
