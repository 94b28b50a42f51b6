"""Static embeddings from a text at hand: positive pointwise mutual information, factored.

Levy and Goldberg 2014 show what skip-gram factors implicitly; this factors it outright, with the smoothed
contexts that Levy et al. 2015 (TACL, section 3.2) recommend. No sampling of examples, so the same text gives
the same embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CONTEXT_SMOOTHING = 0.75
POWER_ITERATIONS = 4
OVERSAMPLING = 10


def cooccurrences(
    documents: Sequence[Sequence[int]], size: int, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Rows, columns and counts of ids within ``window`` places of each other in a document, both ways.

    Returns:
        rows, columns: of the ``(size, size)`` matrix, sorted, each pair once.
    """
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    flat = np.concatenate([np.asarray(d, np.int64) for d in documents]) if documents else keys
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for distance in range(1, window + 1):
        together = owner[distance:] == owner[:-distance]
        left, right = flat[:-distance][together], flat[distance:][together]
        found, times = np.unique(
            np.concatenate([left * size + right, right * size + left]), return_counts=True
        )
        keys, inverse = np.unique(np.concatenate([keys, found]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts, times]), minlength=len(keys)).astype(np.int64)
    return keys // size, keys % size, counts.astype(np.float64)


def ppmi(
    rows: NDArray[np.int64], columns: NDArray[np.int64], counts: NDArray[np.float64], size: int
) -> NDArray[np.float64]:
    """``max(0, log P(w, c) / (P(w) P_α(c)))`` of each pair, α = 0.75 over the contexts."""
    words = np.bincount(rows, counts, minlength=size)
    contexts = np.bincount(columns, counts, minlength=size) ** CONTEXT_SMOOTHING
    share = contexts / contexts.sum()
    return np.maximum(0.0, np.log(counts / words[rows] / share[columns]))


def static_embeddings(
    documents: Sequence[Sequence[int]], size: int, dimensions: int, window: int, seed: int
) -> Tensor:
    """``(size, dimensions)`` embeddings of unit length; zero for an id that never has a neighbour.

    ``U Σ^½`` of the factored matrix, by a randomised range finder with power iterations (Halko et al. 2011,
    algorithm 4.4).
    """
    rows, columns, counts = cooccurrences(documents, size, window)
    values = ppmi(rows, columns, counts, size)
    keep = values > 0
    places = torch.from_numpy(np.stack([rows[keep], columns[keep]]))
    given = torch.sparse_coo_tensor(places, torch.from_numpy(values[keep]), (size, size)).to_sparse_csr()
    flipped = torch.sparse_coo_tensor(places.flip(0), torch.from_numpy(values[keep]), (size, size))
    across = flipped.to_sparse_csr()
    width = min(dimensions + OVERSAMPLING, size)
    start = np.random.default_rng(seed).standard_normal((size, width))
    basis = torch.linalg.qr(given @ torch.from_numpy(start)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(given @ torch.linalg.qr(across @ basis).Q).Q
    left, scale, _ = torch.linalg.svd((across @ basis).T, full_matrices=False)
    found = (basis @ left * scale.sqrt())[:, :dimensions]
    found = torch.nn.functional.pad(found, (0, dimensions - found.shape[1]))
    length = found.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-9, found / length.clamp(min=1e-9), 0.0)
