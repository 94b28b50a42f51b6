"""Quantization grids: how a matrix of weights becomes small integers with scales, and back.

Two kinds. Uniform (Nagel et al. 2021, arXiv 2106.08295, section 2.1): ``w ~ scale * (code - zero)``, one
scale (and zero point) for each ``group_size`` neighbours of a row. By codebook (Dettmers et al. 2023, QLoRA,
arXiv 2305.14314, section 3): ``w ~ absmax * code[index]``, one absmax a block.

Codes are signed, ``-2**(bits-1) .. 2**(bits-1)-1``, also with a zero point: it lies in the same range. Scales
are rounded to bfloat16 before anything is rounded by them, so that a file that stores them in 16 bits, loaded
in bfloat16 or float32, stands for exactly the weights that were simulated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

#: QLoRA, appendix E: quantiles of N(0, 1) normalised to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
#: 1 sign, 2 exponent, 1 mantissa bit, as bitsandbytes lays them out, normalised to [-1, 1].
FP4 = (
    -1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -0.0052083333333333, 0.0,
    0.0052083333333333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0,
)  # fmt: skip
CODEBOOKS = {"nf4": NF4, "fp4": FP4}

# The search over scales tries ranges down to this share of the whole, in so many steps.
SMALLEST_RANGE = 0.5
RANGE_STEPS = 12
SEARCHED_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Grid:
    """A uniform grid.

    Attributes:
        bits: 2 to 8.
        group_size: neighbours of a row that share a scale; None for the whole row.
        symmetric: no zero point.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def bits_per_weight(self, columns: int) -> float:
        """With the 16-bit scale and, where there is one, the zero point of each group."""
        width = self.group_size or columns
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / width

    def fits(self, columns: int) -> bool:
        """Whether a row is a whole number of groups."""
        return self.group_size is None or columns % self.group_size == 0


@dataclass(frozen=True)
class Scales:
    """``scale`` and ``zero``, both ``(rows, groups)`` float32; ``zero`` holds integers (0 when symmetric)."""

    scale: Tensor
    zero: Tensor


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """A view ``(rows, groups, group_size)`` of ``(rows, columns)``.

    Raises:
        ValueError: the columns are no whole number of groups.
    """
    if not grid.fits(weight.shape[1]):
        raise ValueError(f"{weight.shape[1]} columns are no multiple of the group size {grid.group_size}")
    return weight.reshape(len(weight), -1, grid.group_size or weight.shape[1])


def fit(weight: Tensor, grid: Grid, *, search: bool = False, importance: Tensor | None = None) -> Scales:
    """Scales of a matrix ``(rows, columns)``, in float32.

    Args:
        search: try smaller ranges too, and keep for each group that of the least squared error.
        importance: ``(columns,)`` non-negative weights of that error, such as the mean square of a layer's
            inputs; ones by default.
    """
    if not search:
        return _range_scales(*_ranges(grouped(weight.float(), grid)), grid)
    weights = None if importance is None else grouped(importance.float()[None], grid)
    # A few rows at a time, so that they stay in the processor's cache.
    rows = max(1, SEARCHED_ELEMENTS // weight.shape[1])
    found = [_search(grouped(part.float(), grid), grid, weights) for part in torch.split(weight, rows)]
    return Scales(torch.cat([s.scale for s in found]), torch.cat([s.zero for s in found]))


def _ranges(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each group, 0 included."""
    return blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)


def _search(blocks: Tensor, grid: Grid, weights: Tensor | None) -> Scales:
    """The scales of the least squared error of each group, among shares of its range."""
    low, high = _ranges(blocks)
    best = _range_scales(low, high, grid)
    least = _group_error(blocks, best, grid, weights)
    for share in _range_shares(grid):
        tried = _range_scales(low * share, high * share, grid)
        error = _group_error(blocks, tried, grid, weights)
        better = error < least
        least = torch.where(better, error, least)
        best = Scales(
            torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero)
        )
    return best


def _range_shares(grid: Grid) -> list[float]:
    """Shares of the range to try; for symmetric grids also those at which a group's largest value lies on an
    end of the grid, so that what lies on a grid already is found to."""
    shares = [1 - (1 - SMALLEST_RANGE) * step / RANGE_STEPS for step in range(1, RANGE_STEPS + 1)]
    half = ((1 << grid.bits) - 1) / 2
    return [*shares, half / grid.high, half / -grid.low] if grid.symmetric else shares


def _range_scales(low: Tensor, high: Tensor, grid: Grid) -> Scales:
    """Scales that span ``low .. high``, which holds 0; a group of zeros gets scale 1."""
    steps = (1 << grid.bits) - 1
    if grid.symmetric:
        scale = torch.maximum(-low, high) * 2 / steps
    else:
        scale = (high - low) / steps
    scale = _to_bfloat16(scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return Scales(scale, torch.zeros_like(scale))
    return Scales(scale, (grid.low - low / scale).round().clamp(grid.low, grid.high))


def _to_bfloat16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).float()


def _group_error(blocks: Tensor, scales: Scales, grid: Grid, weights: Tensor | None) -> Tensor:
    scale, zero = scales.scale[..., None], scales.zero[..., None]
    codes = blocks.div(scale).add_(zero).round_().clamp_(grid.low, grid.high)
    error = codes.sub_(zero).mul_(scale).sub_(blocks).square_()
    return (error if weights is None else error.mul_(weights)).sum(-1)


def to_codes(weight: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """Round to the nearest code: ``(rows, columns)`` int8."""
    blocks = grouped(weight.float(), grid)
    codes = blocks / scales.scale[..., None] + scales.zero[..., None]
    return codes.round().clamp(grid.low, grid.high).flatten(1).to(torch.int8)


def from_codes(codes: Tensor, grid: Grid, scales: Scales) -> Tensor:
    """The weights that codes stand for: ``(rows, columns)`` float32."""
    blocks = grouped(codes.float(), grid)
    return ((blocks - scales.zero[..., None]) * scales.scale[..., None]).flatten(1)


def fake_quantize(weight: Tensor, grid: Grid, scales: Scales | None = None) -> Tensor:
    """``(rows, columns)`` float32 on the grid, rounded to nearest; scales are fitted when not given."""
    scales = scales or fit(weight, grid)
    return from_codes(to_codes(weight, grid, scales), grid, scales)


def straight_through(weight: Tensor, grid: Grid, scales: Scales | None = None) -> Tensor:
    """:func:`fake_quantize` whose gradient is that of the identity (Bengio et al. 2013, arXiv 1308.3432)."""
    with torch.no_grad():
        change = fake_quantize(weight, grid, scales) - weight.float()
    return weight.float() + change


def fake_quantize_rows(inputs: Tensor, bits: int = 8) -> Tensor:
    """Activations on a symmetric grid with one scale a token (the last dimension), as dynamic int8 does."""
    flat = inputs.flatten(0, -2).float()
    top = (1 << (bits - 1)) - 1
    scale = (flat.abs().amax(-1, keepdim=True) / (top + 0.5)).clamp(min=torch.finfo(torch.float32).tiny)
    return ((flat / scale).round().clamp(-top - 1, top) * scale).view_as(inputs).to(inputs.dtype)


def fake_quantize_codebook(
    weight: Tensor, codebook: str, block_size: int = 64, *, double: bool = False
) -> Tensor:
    """Float32 weights of ``weight``'s shape, each block of ``block_size`` in memory order on a codebook.

    Args:
        codebook: ``nf4`` or ``fp4``.
        double: also round the absmax values to 8 bits around their mean, in blocks of 256 (QLoRA, section 3,
            double quantization; linear here, a dynamic map in bitsandbytes).
    """
    flat = weight.float().flatten()
    pad = -len(flat) % block_size
    blocks = torch.nn.functional.pad(flat, (0, pad)).view(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(CODEBOOKS[codebook], device=weight.device)
    unit = blocks / torch.where(absmax > 0, absmax, torch.ones_like(absmax))
    nearest = code[torch.bucketize(unit, (code[1:] + code[:-1]) / 2)]
    if double:
        absmax = _round_absmax(absmax.flatten())[:, None]
    return (nearest * absmax).flatten()[: len(flat)].view_as(weight)


def _round_absmax(absmax: Tensor, block_size: int = 256) -> Tensor:
    mean = absmax.mean()
    pad = -len(absmax) % block_size
    blocks = torch.nn.functional.pad(absmax - mean, (0, pad)).view(-1, block_size)
    top = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((blocks / top * 127).round() * top / 127).flatten()[: len(absmax)] + mean


def codebook_bits_per_weight(block_size: int = 64, *, double: bool = False) -> float:
    """4 bits and the absmax: 32 bits a block, or 8 bits and 32 a 256 blocks (QLoRA, section 3)."""
    return 4 + (8 / block_size + 32 / (block_size * 256) if double else 32 / block_size)


def working_groups(columns: int) -> list[int]:
    """The powers of two from 16 to 256 that divide ``columns``."""
    return [2**k for k in range(4, 9) if columns % 2**k == 0]


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor | None = None) -> float:
    """How much of a layer's output is lost: ``tr(D H D^T) / tr(W H W^T)``, ``D = W - Q``.

    Args:
        gram: ``(columns, columns)`` H = X^T X of the layer's inputs; the identity by default.
    """
    difference = (weight - quantized).float()
    weight = weight.float()
    if gram is None:
        lost, whole = difference.square().sum(), weight.square().sum()
    else:
        lost, whole = ((difference @ gram) * difference).sum(), ((weight @ gram) * weight).sum()
    return float(lost / whole) if whole > 0 and math.isfinite(whole) else 0.0
