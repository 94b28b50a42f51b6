"""Second moments ``H = X^T X`` of a layer's inputs, and what GPTQ and SparseGPT take from them."""

from __future__ import annotations

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

#: Columns of one product; smaller ones skip more of the lower half, and are slower a product.
PANEL = 256


def add_gram(total: Tensor, rows: Tensor) -> None:
    """``total += rows^T rows``, computing only what lies on and above the diagonal's blocks.

    Args:
        total: ``(columns, columns)``, symmetric.
        rows: ``(tokens, columns)``.
    """
    for start in range(0, len(total), PANEL):
        end = min(start + PANEL, len(total))
        total[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        total[end:, start:end] = total[start:end, end:].T


def inverse_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular ``U`` with ``(H + damping)^-1 = U^T U`` (GPTQ, arXiv 2210.17323, section 3.3, step 3).

    From ``H = R R^T`` with ``R`` upper triangular, a Cholesky factor taken from the other end, ``U = R^-1``:
    one factorisation and one triangular inverse in place of two factorisations and a full inverse. At most
    three matrices of that size are held at a time.

    Args:
        gram: ``(columns, columns)``; columns that never saw an input, with a zero on the diagonal, get a one.
        damping: share of the mean of the diagonal that is added to it.
        order: ``(columns,)`` of H's columns; as they are by default.
    """
    backwards = (torch.arange(len(gram), device=gram.device) if order is None else order).flip(0)
    damped = gram.float()[backwards[:, None], backwards]
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    lower: Tensor = torch.linalg.cholesky(damped)
    del damped, diagonal
    inverse: Tensor = torch.eye(len(lower), device=lower.device).T  # by columns: solved for in place
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    return inverse.flip(0, 1).contiguous()
