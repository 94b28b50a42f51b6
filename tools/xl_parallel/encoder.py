"""A sentence encoder for two sides of a language pair, learnt from pairs in seconds and without a download.

Each side's texts are tf-idf vectors of hashed character n-grams and words, scaled to length 1: X ``(n, p)``,
Y ``(n, q)``. The singular vectors of the cross-covariance ``Xᵀ Y = U S Vᵀ`` (two-block partial least squares)
bring them into one space, ``z(x) = x U`` and ``z(y) = y V``. The cosine of a pair's vectors is high where the
grams of one side go with those of the other in the pairs seen. Weighing the directions by powers of S made
retrieval worse. Singular vectors are found by randomised subspace iteration (Halko, Martinsson and Tropp
2011, algorithm 4.4) from a fixed seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import ToolError
from tuneutils.tools.xl_parallel.hashed import U64, document_frequencies, matrix

Floats = NDArray[np.float32]

CONFIG = "encoder.json"
WEIGHTS = "encoder.safetensors"
_OVERSAMPLING = 16
_ITERATIONS = 1


@dataclass(frozen=True)
class Side:
    """What one side's texts are seen through.

    Attributes:
        languages: of its texts.
        hashes: ``(p,)``, ascending: the grams known.
        idf: ``(p,)``.
        projection: ``(p, d)``, float16.
    """

    languages: tuple[str, ...]
    hashes: U64
    idf: Floats
    projection: NDArray[np.float16]

    def weighted(self, texts: Sequence[str]) -> Any:
        """tf-idf rows, CSR ``(n, p)``, not scaled: that of two texts joined is the sum of theirs."""
        rows = matrix(texts, self.hashes)
        rows.data *= self.idf[rows.indices]
        return rows

    def sums(self, texts: Sequence[str]) -> Floats:
        """``(n, d)``: vectors before scaling to length 1, additive as ``weighted``."""
        return np.asarray(self.weighted(texts) @ self.projection.astype(np.float32), np.float32)


@dataclass(frozen=True)
class Encoder:
    """Both sides, with what was learnt from.

    Attributes:
        singular_values: ``(d,)`` of the cross-covariance, descending.
        pairs: distinct pairs learnt from.
    """

    src: Side
    tgt: Side
    singular_values: Floats
    pairs: int

    @property
    def dim(self) -> int:
        return len(self.singular_values)

    def side(self, lang: str) -> Side:
        """The side that a language is on.

        Raises:
            ToolError: on neither (65).
        """
        for side in (self.src, self.tgt):
            if lang in side.languages:
                return side
        known = ", ".join((*self.src.languages, *self.tgt.languages))
        raise ToolError(f"the encoder knows {known}, not {lang!r}; train one: xl-parallel encoder PAIRS")

    def encode(self, texts: Sequence[str], lang: str) -> Floats:
        """``(n, d)`` of length 1; a text without a known gram is a row of zeros."""
        return normalised(self.side(lang).sums(texts))

    def sums(self, texts: Sequence[str], lang: str) -> Floats:
        """``(n, d)``, not scaled; see ``Side.sums``."""
        return self.side(lang).sums(texts)

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {"singular_values": self.singular_values}
        for name, side in (("src", self.src), ("tgt", self.tgt)):
            tensors[f"{name}.hashes"] = side.hashes.view(np.int64)
            tensors[f"{name}.idf"] = side.idf
            tensors[f"{name}.projection"] = side.projection
        save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(folder / WEIGHTS))
        config = {"src": self.src.languages, "tgt": self.tgt.languages, "dim": self.dim, "pairs": self.pairs}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        from safetensors.numpy import load_file

        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = load_file(str(folder / WEIGHTS))
        sides = [
            Side(
                tuple(config[name]),
                found[f"{name}.hashes"].view(np.uint64),
                found[f"{name}.idf"],
                found[f"{name}.projection"],
            )
            for name in ("src", "tgt")
        ]
        return cls(sides[0], sides[1], found["singular_values"], int(config["pairs"]))


def normalised(rows: Floats) -> Floats:
    """Rows of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def train(
    src: Sequence[str],
    tgt: Sequence[str],
    src_langs: Sequence[str],
    tgt_langs: Sequence[str],
    *,
    dim: int,
    features: int,
    seed: int,
) -> Encoder:
    """Learn an encoder of aligned texts.

    Args:
        src, tgt: ``(n,)`` each; row i of one is the translation of row i of the other.
        dim: at most this many dimensions; fewer where the pairs span fewer.
        features: at most this many grams a side, those in most texts.

    Raises:
        ToolError: fewer than two distinct pairs, or nothing in common among them (65).
    """
    pairs = sorted(set(zip(src, tgt)))
    if len(pairs) < 2:
        raise ToolError(f"{len(pairs)} distinct pair; an encoder needs at least 2, better some thousands")
    left, right = [a for a, _ in pairs], [b for _, b in pairs]
    sides = [_vocabulary(left, src_langs, features), _vocabulary(right, tgt_langs, features)]
    x, y = (_scaled(side.weighted(texts)) for side, texts in zip(sides, (left, right)))
    u, s, v = _cross_svd(x, y, min(dim, len(pairs) - 1), seed)
    if not len(s):
        raise ToolError("no n-gram comes in two texts of a side: too few pairs to learn from")
    made = [
        Side(side.languages, side.hashes, side.idf, vectors.astype(np.float16))
        for side, vectors in zip(sides, (u, v))
    ]
    return Encoder(made[0], made[1], s.astype(np.float32), len(pairs))


def _vocabulary(texts: Sequence[str], languages: Sequence[str], features: int) -> Side:
    """The grams in two texts or more, the most frequent first where they are too many."""
    hashes, frequencies = document_frequencies(texts)
    kept = np.flatnonzero(frequencies > 1)
    if len(kept) > features:
        order = np.lexsort((hashes[kept], -frequencies[kept]))
        kept = np.sort(kept[order[:features]])
    idf = np.log((1 + len(texts)) / (1 + frequencies[kept])).astype(np.float32)
    return Side(tuple(sorted(set(languages))), hashes[kept], idf, np.zeros((len(kept), 0), np.float16))


def _scaled(rows: Any) -> Any:
    """Rows of length 1."""
    lengths = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    factors = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    scaled = rows.copy()
    scaled.data *= np.repeat(factors, np.diff(rows.indptr)).astype(np.float32)
    return scaled


def _cross_svd(x: Any, y: Any, dim: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """The first singular triplets of ``xᵀ y``, without ever making it."""
    rank = min(dim + _OVERSAMPLING, x.shape[1], y.shape[1])
    if not rank:
        empty = np.zeros((0, 0), np.float32)
        return empty, np.zeros(0, np.float32), empty
    xt, yt = x.T.tocsr(), y.T.tocsr()
    start = np.random.default_rng(seed).standard_normal((y.shape[1], rank)).astype(np.float32)
    q = _orthonormal(xt @ (y @ start))
    for _ in range(_ITERATIONS):
        q = _orthonormal(xt @ (y @ _orthonormal(yt @ (x @ q))))
    across = yt @ (x @ q)  # (q, rank) = (xᵀ y)ᵀ q; its singular triplets by the small Gram matrix
    squares, inner = np.linalg.eigh((across.T @ across).astype(np.float64))
    order = np.argsort(-squares)[:dim]
    s = np.sqrt(np.maximum(squares[order], 0))
    order = order[s > 1e-3 * s[0]] if len(s) and s[0] > 0 else order[:0]
    inner, s = inner[:, order].astype(np.float32), np.sqrt(squares[order]).astype(np.float32)
    u, v = q @ inner, across @ inner / s
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(len(s))])  # a singular pair's sign is arbitrary
    return u * signs, s, v * signs


def _orthonormal(columns: Floats) -> Floats:
    """A basis of the columns' span, by the eigenvectors of their Gram matrix; dependent columns go."""
    values, vectors = np.linalg.eigh((columns.T @ columns).astype(np.float64))
    keep = values > 1e-9 * max(values[-1], 0)
    return columns @ (vectors[:, keep] / np.sqrt(values[keep])).astype(np.float32)
