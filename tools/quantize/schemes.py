"""From a layer's matrices to the tensors that are stored for them, by scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.hessian import add_gram
from tuneutils.shared.layerwise import Step
from tuneutils.shared.packing import packed_tensors, plain_tensors
from tuneutils.shared.quantizers import Grid, Scales, fit, from_codes, to_codes
from tuneutils.tools.quantize import bnb
from tuneutils.tools.quantize.gptq import gptq

if TYPE_CHECKING:
    from tuneutils.tools.quantize.cli import Params


@dataclass
class Inputs:
    """Statistics of the inputs of a layer's matrices; those that share their inputs are a group.

    Attributes:
        groups: names within the layer, in the order in which they run; empty without calibration.
    """

    groups: list[list[str]]
    _grams: dict[str, Tensor] = field(default_factory=dict)
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: int = 0

    @classmethod
    def measure(cls, step: Step, *, magnitudes: bool = False) -> Inputs:
        """Run the calibration data through a layer."""
        made = cls([])

        def see(name: str, inputs: Tensor) -> None:
            rows = inputs.float()
            # Inputs in bfloat16 are multiplied exactly by bfloat16 units that add up in float32.
            with bfloat16_products(inputs.dtype == torch.bfloat16):
                if name not in made._grams:
                    made._grams[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
                add_gram(made._grams[name], rows)
            if magnitudes:
                total = rows.abs().sum(0)
                made._sums[name] = made._sums[name] + total if name in made._sums else total

        made.groups = step.observe_all(see)
        made._tokens = step.inputs.shape[0] * step.inputs.shape[1]
        for names in made.groups:
            for name in names[1:]:
                made._grams[name] = made._grams[names[0]]
        return made

    def gram(self, name: str) -> Tensor | None:
        """``(columns, columns)`` sum over tokens of ``x x^T``; None without calibration."""
        return self._grams.get(name)

    def magnitude(self, name: str) -> Tensor:
        """``(columns,)`` mean of ``|x|``, of the first of a group."""
        return self._sums[name] / self._tokens

    def rescale(self, names: list[str], scale: Tensor) -> None:
        """Inputs are divided by ``scale`` from here on."""
        for name in names:
            self._grams[name] = self._grams[name] / scale / scale[:, None]


class bfloat16_products:
    """Let float32 products use bfloat16 units for their operands, where the caller knows that to be exact."""

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        if self._on:
            torch.set_float32_matmul_precision("medium")

    def __exit__(self, *exc: object) -> None:
        torch.set_float32_matmul_precision(self._before)


@dataclass
class Layer:
    """A decoder layer's matrices ``(rows, columns)`` in float32, by their names within it."""

    name: str
    weights: dict[str, Tensor]
    inputs: Inputs


@dataclass
class Stored:
    """A matrix as it is stored.

    Attributes:
        tensors: by their names in the file.
        weight: what they stand for, float32.
        bits: a weight, scales included.
    """

    tensors: dict[str, Tensor]
    weight: Tensor

    @property
    def bits(self) -> float:
        stored = sum(t.numel() * t.element_size() for t in self.tensors.values())
        return round(8 * stored / self.weight.numel(), 4)


@dataclass
class Rounded:
    """A matrix on a uniform grid."""

    codes: Tensor
    scales: Scales
    grid: Grid

    def dequantized(self) -> Tensor:
        return from_codes(self.codes, self.grid, self.scales)

    def stored(self, name: str, dtype: torch.dtype, *, plain: bool = False) -> Stored:
        """Packed, or as plain int8 for formats that round inputs too."""
        if plain:
            tensors = plain_tensors(name, self.codes, self.scales, dtype)
        else:
            tensors = packed_tensors(name, self.codes, self.grid, self.scales, dtype)
        return Stored(tensors, self.dequantized())


def round_nearest(weight: Tensor, grid: Grid, importance: Tensor | None, *, search: bool = False) -> Rounded:
    """Each weight to its nearest point."""
    scales = fit(weight, grid, search=search, importance=importance)
    return Rounded(to_codes(weight, grid, scales), scales, grid)


def on_grid(
    layer: Layer, grids: Mapping[str, Grid], params: Params, dtype: torch.dtype
) -> Iterator[tuple[str, Stored]]:
    """A layer's matrices by rounding to nearest, GPTQ or AWQ (whose scales are applied already)."""
    plain = params.scheme == "int8-dynamic"
    if params.scheme in ("gptq", "mixed"):
        yield from _by_gptq(layer, grids, params, dtype)
        return
    for name, weight in layer.weights.items():
        gram = layer.inputs.gram(name)
        calibrated = params.scheme == "awq" and gram is not None
        importance = gram.diagonal() if calibrated and gram is not None else None
        rounded = round_nearest(weight, grids[name], importance, search=calibrated)
        yield name, rounded.stored(f"{layer.name}.{name}", dtype, plain=plain)


def _by_gptq(
    layer: Layer, grids: Mapping[str, Grid], params: Params, dtype: torch.dtype
) -> Iterator[tuple[str, Stored]]:
    """Matrices with the same inputs and grid are one matrix to GPTQ: their rows do not interact."""
    for group in layer.inputs.groups:
        by_grid: dict[Grid, list[str]] = {}
        for name in group:
            if name in layer.weights:
                by_grid.setdefault(grids[name], []).append(name)
        for grid, names in by_grid.items():
            gram = layer.inputs.gram(names[0])
            assert gram is not None
            codes, scales = gptq(
                torch.cat([layer.weights[n] for n in names]),
                gram,
                grid,
                act_order=params.act_order,
                damping=params.damping,
            )
            start = 0
            for name in names:
                end = start + len(layer.weights[name])
                part = Scales(scales.scale[start:end], scales.zero[start:end])
                rounded = Rounded(codes[start:end], part, grid)
                yield name, rounded.stored(f"{layer.name}.{name}", dtype)
                start = end


def on_codebook(layer: Layer, scheme: str, dtype: torch.dtype) -> Iterator[tuple[str, Stored]]:
    """A layer's matrices in bitsandbytes' formats, as it would quantize them in the stored precision."""
    for name, weight in layer.weights.items():
        module = f"{layer.name}.{name}"
        if scheme == "llm-int8":
            tensors, stands_for = bnb.eight_bit(module, weight.to(dtype))
        else:
            tensors, stands_for = bnb.four_bit(module, weight.to(dtype), scheme)
        yield name, Stored(tensors, stands_for)
