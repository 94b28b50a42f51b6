"""Which single weights go: magnitude, Wanda and SparseGPT, unstructured or N of M.

Weights are ``(out, in)``; a mask is True where a weight goes. For N:M each row is cut into groups of M
neighbouring columns, of which the M - N of lowest score go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor  # isort: skip

from tuneutils.shared.errors import ExitCode, ToolError

#: Columns of which SparseGPT chooses at once, and updates those after them (its paper's B_s).
BLOCK = 128


@dataclass(frozen=True)
class Pattern:
    """``keep`` of ``group`` neighbours stay; a group of 0 is unstructured."""

    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``unstructured`` or ``2:4``.

        Raises:
            ToolError: exit 2.
        """
        if text == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ToolError(
                f"--pattern {text}: must be unstructured, or N:M with N below M", code=ExitCode.USAGE
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group


@dataclass
class Inputs:
    """What is known of a matrix's inputs on the calibration text.

    Attributes:
        squares: ``(in,)`` sum of squares over tokens.
        products: ``(in, in)`` sum of x xᵀ over tokens, for SparseGPT alone.
    """

    squares: Tensor
    products: Tensor | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, *, products: bool) -> Inputs:
        return cls(torch.zeros(columns), torch.zeros(columns, columns) if products else None)

    def add(self, rows: Tensor) -> None:
        """Count in ``(tokens, in)``."""
        rows = rows.float()
        self.squares += rows.square().sum(0).cpu()
        if self.products is not None:
            self.products.addmm_(rows.T.cpu(), rows.cpu())
        self.tokens += len(rows)


def lowest(scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask of the lowest scores ``(out, in)`` of each row, or of each group; of equals the earlier goes."""
    if pattern.group:
        groups = scores.unflatten(-1, (-1, pattern.group))
        order = groups.argsort(dim=-1, stable=True)[..., : pattern.group - pattern.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)
    count = int(sparsity * scores.shape[-1])
    order = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def magnitude_mask(weight: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """The smallest weights of the whole matrix, or of each group."""
    scores = weight.abs()
    if pattern.group:
        return lowest(scores, sparsity, pattern)
    return lowest(scores.flatten()[None], sparsity, pattern).view_as(weight)


def wanda_mask(weight: Tensor, inputs: Inputs, sparsity: float, pattern: Pattern) -> Tensor:
    """By |w| · ‖x‖₂, compared within each output (Sun et al. 2024, arXiv 2306.11695, equation 1)."""
    return lowest(weight.abs() * inputs.squares.sqrt().to(weight.device), sparsity, pattern)


def sparsegpt(weight: Tensor, inputs: Inputs, sparsity: float, pattern: Pattern, damping: float) -> Tensor:
    """The pruned weight, what is left adjusted for what went (Frantar and Alistarh 2023, arXiv 2301.00774).

    Algorithm 1: column by column a weight goes where w² / [H⁻¹]² is among the block's lowest, and its error
    is spread over the columns that are still to come, by the Cholesky factor of the inverse Hessian.
    """
    assert inputs.products is not None
    w = weight.float().clone()
    hessian = inputs.products * (2 / max(inputs.tokens, 1))
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())), upper=True
    ).float()
    columns = w.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block, factor = w[:, start:end].clone(), inverse[start:end, start:end]
        mask = torch.zeros_like(block, dtype=torch.bool)
        if not pattern.group:
            scores = block.square() / factor.diagonal().square()
            mask = lowest(scores.flatten()[None], sparsity, pattern).view_as(block)
        errors = torch.zeros_like(block)
        for i in range(end - start):
            if pattern.group and i % pattern.group == 0:  # scored once the columns before have been paid for
                part = slice(i, i + pattern.group)
                mask[:, part] = lowest(
                    block[:, part].square() / factor.diagonal()[part].square(), sparsity, pattern
                )
            kept = block[:, i].masked_fill(mask[:, i], 0)
            error = (block[:, i] - kept) / factor[i, i]
            block[:, i:] -= error[:, None] * factor[i, i:]
            block[:, i] = kept
            errors[:, i] = error
        w[:, start:end] = block
        w[:, end:] -= errors @ inverse[start:end, end:]
    return w.to(weight.dtype)


def output_error(before: Tensor, after: Tensor, inputs: Inputs) -> float:
    """``‖(W - W') X‖² / ‖W X‖²`` on the calibration text."""
    assert inputs.products is not None
    change = (before - after).float().cpu()
    base = before.float().cpu()
    return float(
        ((change @ inputs.products) * change).sum() / ((base @ inputs.products) * base).sum().clamp(min=1e-30)
    )
