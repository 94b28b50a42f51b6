"""Many texts at once as rows of a sparse matrix over hashed character n-grams and words.

A gram is a polynomial in its code points modulo 2^64; with prefix sums of ``c_k p^k`` every substring's hash
is one difference times a power of the inverse of p, so that all grams of all texts are made without a loop
over texts (Karp and Rabin 1987).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Ints = NDArray[np.int64]

#: Lengths of the character n-grams; they span the spaces around words, not those between texts.
SIZES = (2, 3, 4, 5)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)
_SPACE = 32


def fold(text: str) -> str:
    """Lower case, compatibility forms made one, white space made single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def grams(texts: Sequence[str], sizes: Sequence[int] = SIZES, words: bool = True) -> tuple[Ints, U64]:
    """Every n-gram and word of every text.

    Returns:
        Row numbers and 64-bit hashes, each ``(grams,)``, with repetitions, in no order.
    """
    folded = [f" {fold(t)} " for t in texts]
    lengths = np.array([len(t) for t in folded], np.int64)
    joined = "".join(folded).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(joined, np.uint32).astype(np.uint64)
    if not len(codes):
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    owner = np.repeat(np.arange(len(texts), dtype=np.int64), lengths)
    with np.errstate(over="ignore"):
        prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix(codes) * _powers(_BASE, len(codes)))])
        undo = _powers(_INVERSE, len(codes))
        found = [_sized(codes, owner, prefix, undo, size) for size in sizes]
        if words:
            found.append(_words(codes, owner, prefix, undo))
    return np.concatenate([r for r, _ in found]), np.concatenate([h for _, h in found])


def matrix(
    texts: Sequence[str], hashes: U64, sizes: Sequence[int] = SIZES, words: bool = True, batch: int = 4096
) -> Any:
    """Counts of the grams in ``hashes`` (ascending): a CSR matrix ``(texts, len(hashes))`` in float32."""
    from scipy import sparse

    blocks = []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        rows, found = grams(some, sizes, words)
        at = np.searchsorted(hashes, found)
        at[at == len(hashes)] = 0
        known = hashes[at] == found if len(hashes) else np.zeros(len(found), bool)
        made = sparse.csr_matrix(
            (np.ones(int(known.sum()), np.float32), (rows[known], at[known])), (len(some), len(hashes))
        )
        made.sum_duplicates()
        blocks.append(made)
    if not blocks:
        return sparse.csr_matrix((0, len(hashes)), dtype=np.float32)
    return sparse.vstack(blocks, format="csr")


def document_frequencies(
    texts: Sequence[str], sizes: Sequence[int] = SIZES, batch: int = 4096
) -> tuple[U64, Ints]:
    """The hashes of all grams and words, ascending, and in how many texts each comes."""
    parts = []
    for start in range(0, len(texts), batch):
        rows, found = grams(texts[start : start + batch], sizes)
        hashes, number = np.unique(found, return_inverse=True)
        in_texts = np.sort(number * batch + rows)
        once = in_texts[np.diff(in_texts, prepend=-1) > 0] // batch  # each gram once a text
        parts.append((hashes, np.bincount(once, minlength=len(hashes))))
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    joined, counts = np.concatenate([h for h, _ in parts]), np.concatenate([c for _, c in parts])
    hashes, inverse = np.unique(joined, return_inverse=True)
    return hashes, np.bincount(inverse, weights=counts, minlength=len(hashes)).astype(np.int64)


def _sized(codes: U64, owner: Ints, prefix: U64, undo: U64, size: int) -> tuple[Ints, U64]:
    """Grams of one size within a text; a space may be their first or last character, not an inner one."""
    count = len(codes) - size + 1
    if count <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    keep = owner[:count] == owner[size - 1 :]
    for inner in range(1, size - 1):
        keep &= codes[inner : inner + count] != _SPACE
    if size == 2:
        keep &= (codes[:count] != _SPACE) | (codes[1:] != _SPACE)
    starts = np.flatnonzero(keep)
    return owner[starts], _hash(prefix, undo, starts, starts + size)


def _words(codes: U64, owner: Ints, prefix: U64, undo: U64) -> tuple[Ints, U64]:
    """What stands between spaces, together with the space before it: never equal to an n-gram of SIZES."""
    space = codes == _SPACE
    starts = np.flatnonzero(~space[1:] & space[:-1]) + 1
    ends = np.flatnonzero(~space[:-1] & space[1:]) + 1
    hashed = _hash(prefix, undo, starts, ends) ^ np.uint64(_INVERSE)
    return owner[starts], hashed


def _hash(prefix: U64, undo: U64, starts: Ints, ends: Ints) -> U64:
    value = (prefix[ends] - prefix[starts]) * undo[starts]
    value = (value ^ (value >> np.uint64(29))) * np.uint64(_BASE)
    return value ^ (value >> np.uint64(32))


def _mix(codes: U64) -> U64:
    value = (codes + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(31))


def _powers(base: int, count: int) -> U64:
    """``base^0 … base^(count-1)`` modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)
