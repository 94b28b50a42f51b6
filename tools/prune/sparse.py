"""Which single weights go: magnitude, Wanda and SparseGPT, unstructured or N of M.

Weights are ``(out, in)``; a mask is True where a weight goes. For N:M each row is cut into groups of M
neighbouring columns, of which the M - N of lowest score go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor  # isort: skip

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.hessian import add_gram, inverse_factor

#: Columns of which SparseGPT chooses at once, and updates those after them (its paper's B_s), and the smaller
#: blocks within which they are updated one by one.
BLOCK = 128
INNER_BLOCK = 32


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
        products: ``(in, in)`` sum of x xᵀ over every ``every``-th token.
    """

    squares: Tensor
    products: Tensor
    every: int = 1

    @classmethod
    def empty(cls, columns: int, *, every: int = 1) -> Inputs:
        return cls(torch.zeros(columns), torch.zeros(columns, columns), every)

    def add(self, rows: Tensor) -> None:
        """Count in ``(tokens, in)``."""
        rows = rows.float()
        self.squares += rows.square().sum(0).cpu()
        add_gram(self.products, rows[:: self.every].cpu())


def lowest(scores: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """Mask of the lowest scores ``(out, in)`` of each row, or of each group; of equals the earlier goes."""
    if pattern.group:
        groups = scores.unflatten(-1, (-1, pattern.group))
        order = groups.argsort(dim=-1, stable=True)[..., : pattern.group - pattern.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)
    count = int(sparsity * scores.shape[-1])
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    mask = scores <= scores.kthvalue(count, dim=-1, keepdim=True).values
    if bool((mask.sum(-1) == count).all()):
        return mask
    order = scores.argsort(dim=-1, stable=True)[..., :count]  # equals at the threshold
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


def sparsegpt(
    weights: Sequence[Tensor], inputs: Inputs, shares: Sequence[float], pattern: Pattern, damping: float
) -> list[Tensor]:
    """Pruned weights, what is left adjusted for what went (Frantar and Alistarh 2023, arXiv 2301.00774).

    Algorithm 1: column by column a weight goes where w² / [H⁻¹]² is among the block's lowest, and its error
    is spread over the columns that are still to come, by the Cholesky factor of the inverse Hessian.

    Args:
        weights: ``(out, in)`` each, of matrices with the same inputs: their rows do not interact.
        shares: of each matrix, what goes.
    """
    sizes = [len(weight) for weight in weights]
    w = torch.cat([weight.float().cpu() for weight in weights]).T.contiguous()  # a column is a contiguous row
    w[inputs.products.diagonal() == 0] = 0
    factor = inverse_factor(inputs.products, damping)
    diagonal, lower = factor.diagonal().clone(), factor.T.contiguous()
    del factor
    steps = diagonal.tolist()
    inner, size = (n - n % (pattern.group or 1) or pattern.group for n in (INNER_BLOCK, BLOCK))
    for start in range(0, len(w), size):
        end = min(start + size, len(w))
        mask = torch.zeros(end - start, w.shape[1], dtype=torch.bool)
        if not pattern.group:
            scores = (w[start:end] / diagonal[start:end, None]).square().split(sizes, dim=1)
            for part, score, share in zip(mask.split(sizes, dim=1), scores, shares, strict=True):
                part.copy_(lowest(score.flatten()[None], share, pattern).view_as(score))
        errors = torch.empty(end - start, w.shape[1])
        for first in range(start, end, inner):
            last = min(first + inner, end)
            for i in range(first, last):
                if pattern.group and i % pattern.group == 0:  # scored once the columns before are paid for
                    group = slice(i, i + pattern.group)
                    score = (w[group] / diagonal[group, None]).square().T
                    mask[i - start : i - start + pattern.group] = lowest(score, 0, pattern).T
                error = torch.where(mask[i - start], w[i], 0).div_(steps[i])
                w[i].masked_fill_(mask[i - start], 0)
                w[i + 1 : last].addr_(lower[i + 1 : last, i], error, alpha=-1)
                errors[i - start] = error
            w[last:end].addmm_(lower[last:end, first:last], errors[first - start : last - start], alpha=-1)
        w[end:].addmm_(lower[end:, start:end], errors, alpha=-1)
    parts = w.T.split(sizes)
    return [part.to(weight).contiguous() for part, weight in zip(parts, weights, strict=True)]


def output_error(before: Tensor, after: Tensor, inputs: Inputs) -> float:
    """``‖(W - W') X‖² / ‖W X‖²`` on the calibration text."""
    change, base = (before - after).float().cpu(), before.float().cpu()
    lost, whole = (((m @ inputs.products) * m).sum() for m in (change, base))
    return float(lost / whole.clamp(min=1e-30))
