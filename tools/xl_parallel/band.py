"""Where to look in large documents: a path through blocks of sentences, and a band around it.

Coarse to fine as in Vecalign (Thompson and Koehn 2019, section 3.2, after Salvador and Chan 2007's FastDTW):
sentences are summed in blocks of ``BLOCK``, aligned block by block, and only cells near that path are looked
at among the sentences.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tuneutils.tools.xl_parallel.beads import Bead, whole

Ints = NDArray[np.int64]

#: Cells of a table that is searched as a whole.
CELLS = 2_000_000
BLOCK = 8
#: Sentences to each side of the coarse path, at least.
RADIUS = 64

#: Aligns the documents with their sentences summed in blocks of a size, within a band.
Align = Callable[[int, Ints, int], list[Bead]]


def band(n: int, m: int, align: Align, block: int = 1) -> tuple[Ints, int]:
    """First columns ``(rows + 1,)`` and width for ``best_path`` on blocks of ``block`` sentences."""
    rows, cols = -(-n // block), -(-m // block)
    if rows * cols <= CELLS:
        return whole(rows, cols)
    coarse = align(block * BLOCK, *band(n, m, align, block * BLOCK))
    at = np.array([[0, 0], *([b.src_end, b.tgt_end] for b in coarse)]) * BLOCK
    corners, first = np.unique(np.minimum(at[:, 0], rows), return_index=True)
    last = np.append(first[1:], len(at)) - 1
    low = np.minimum(np.interp(np.arange(rows + 1), corners, at[first, 1]), cols)
    high = np.minimum(np.interp(np.arange(rows + 1), corners, at[last, 1]), cols)
    radius = max(RADIUS, 2 * BLOCK)
    left = np.maximum(np.floor(np.minimum(low, high)) - radius, 0).astype(np.int64)
    width = int(np.max(np.ceil(high) + radius - left)) + 1
    left = np.minimum(left, max(cols + 1 - width, 0))
    return np.maximum.accumulate(left), min(width, cols + 1)
