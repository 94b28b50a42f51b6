"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, each error made good by the rest.

Minimises ``||W X - Q X||^2`` of one linear layer, given the Gram matrix ``H = X X^T`` of its inputs.
"""

from __future__ import annotations

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.hessian import inverse_factor
from tuneutils.shared.quantizers import Grid, Scales, fit

# Columns whose errors are applied to the columns behind them in one product (section 3.3, step 2), and the
# smaller blocks within which they are applied one by one.
LAZY_BLOCK = 128
INNER_BLOCK = 32


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, act_order: bool = True, damping: float = 0.01
) -> tuple[Tensor, Scales]:
    """Codes ``(rows, columns)`` int8 and their scales.

    Args:
        weight: ``(rows, columns)``; rows of several layers with the same inputs may be stacked.
        gram: ``(columns, columns)``, a sum or mean over tokens of ``x x^T``.
        act_order: take columns in the order of falling ``diag(H)``, groups staying what they are in memory,
            so that no index of groups need be stored (the authors' ``--act-order --static-groups``).
        damping: share of the mean of ``diag(H)`` added to it (section 3.3, step 3).
    """
    power = gram.diagonal().clone()
    weight = weight.float().masked_fill(power == 0, 0)
    scales = fit(weight, grid, search=True, importance=power)
    columns, group_size = weight.shape[1], grid.group_size or weight.shape[1]
    order = power.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    work, groups = weight.T[order], (order // group_size).tolist()  # a column of W is a contiguous row
    del weight
    factor = inverse_factor(gram, damping, order)
    scale, zero = scales.scale.T.contiguous(), scales.zero.T.contiguous()
    steps, zeros, offsets = scale.unbind(), zero.unbind(), (-scale * zero).unbind()
    diagonal, lower = factor.diagonal().tolist(), factor.T.contiguous()
    del factor
    codes = torch.empty_like(work)
    for start in range(0, columns, LAZY_BLOCK):
        end = min(start + LAZY_BLOCK, columns)
        errors = torch.empty_like(work[start:end])
        for first in range(start, end, INNER_BLOCK):
            last = min(first + INNER_BLOCK, end)
            done = errors[first - start : last - start]
            for i in range(first, last):
                # What the columns before this one in the inner block owe it.
                column = torch.addmv(work[i], done[: i - first].T, lower[i, first:i], alpha=-1)
                step, group = steps[groups[i]], groups[i]
                code = torch.addcdiv(zeros[group], column, step, out=codes[i])
                code.round_().clamp_(grid.low, grid.high)
                # Equation 2: the error of this column over the diagonal of the inverse's factor.
                torch.sub(column, torch.addcmul(offsets[group], code, step), out=done[i - first])
                done[i - first].mul_(1 / diagonal[i])
            if last < end:
                work[last:end].addmm_(lower[last:end, first:last], done, alpha=-1)
        if end < columns:
            # Equation 4: the whole block's errors on everything behind it.
            work[end:].addmm_(lower[end:, start:end], errors, alpha=-1)
    restored = torch.empty(codes.shape, dtype=torch.int8, device=codes.device)
    restored[order] = codes.to(torch.int8)
    return restored.T.contiguous(), scales
