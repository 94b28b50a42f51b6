"""Grids and codebooks against closed forms, brute force, published tables and bitsandbytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tuneutils.shared import quantizers
from tuneutils.shared.quantizers import Grid

GRIDS = [
    Grid(bits, group, symmetric)
    for bits, group, symmetric in itertools.product((2, 3, 4, 8), (None, 16, 32), (True, False))
]
# Dettmers et al. 2023, appendix E.
PAPER_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * 0.1


def test_nf4_is_the_papers_table() -> None:
    assert list(quantizers.NF4) == PAPER_NF4


def test_nf4_follows_from_normal_quantiles() -> None:
    """Section 3: eight steps on the positive side, seven on the negative, offset .9677083."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    torch.testing.assert_close(
        values / values.max(), torch.tensor(quantizers.NF4, dtype=torch.float64), atol=2e-7, rtol=0
    )


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_codebooks_agree_with_bitsandbytes(codebook: str, weight: torch.Tensor) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, quant_type=codebook, blocksize=64)
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(
        quantizers.fake_quantize_codebook(weight, codebook), theirs, rtol=1e-6, atol=1e-8
    )


def test_double_quantization_saves_the_papers_bits() -> None:
    saved = quantizers.codebook_bits_per_weight(64) - quantizers.codebook_bits_per_weight(64, double=True)
    assert round(saved, 3) == 0.373


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_is_at_most_half_a_step(grid: Grid, weight: torch.Tensor) -> None:
    scales = quantizers.fit(weight, grid)
    error = (quantizers.fake_quantize(weight, grid, scales) - weight).abs()
    steps = scales.scale.repeat_interleave(weight.shape[1] // scales.scale.shape[1], 1)
    slack = 0.51 + (1 << grid.bits) * 2**-9 + (0.5 if not grid.symmetric else 0)
    assert bool((error <= slack * steps).all())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("search", [False, True])
def test_a_grids_own_points_stay(grid: Grid, search: bool, weight: torch.Tensor) -> None:
    scales = quantizers.fit(weight, grid)
    once = quantizers.fake_quantize(weight, grid, scales)
    codes = quantizers.to_codes(once, grid, scales)
    assert torch.equal(quantizers.from_codes(codes, grid, scales), once)
    assert torch.equal(codes, quantizers.to_codes(weight, grid, scales))


def test_rounding_is_to_the_nearest_point_by_brute_force(weight: torch.Tensor) -> None:
    grid = Grid(3, 16, symmetric=False)
    scales = quantizers.fit(weight, grid)
    codes = torch.arange(grid.low, grid.high + 1)
    for row, column in itertools.product(range(2), range(64)):
        scale, zero = scales.scale[row, column // 16], scales.zero[row, column // 16]
        points = (codes - zero) * scale
        nearest = points[(points - weight[row, column]).abs().argmin()]
        assert quantizers.fake_quantize(weight, grid, scales)[row, column] == nearest


def test_an_asymmetric_grid_wins_on_one_sided_weights(weight: torch.Tensor) -> None:
    one_sided = weight.abs()
    errors = [
        (quantizers.fake_quantize(one_sided, Grid(4, 16, symmetric)) - one_sided).square().mean()
        for symmetric in (True, False)
    ]
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_never_loses(symmetric: bool, weight: torch.Tensor) -> None:
    grid = Grid(4, 16, symmetric)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1))

    def error(**how) -> torch.Tensor:
        quantized = quantizers.fake_quantize(weight, grid, quantizers.fit(weight, grid, **how))
        return ((quantized - weight).square() * importance).view(6, 4, 16).sum(-1)

    searched, plain = error(search=True, importance=importance), error()
    assert bool((searched <= plain * (1 + 1e-6)).all())
    assert searched.sum() < 0.95 * plain.sum()


def test_scales_are_exact_in_bfloat16(weight: torch.Tensor) -> None:
    for search in (False, True):
        scale = quantizers.fit(weight, Grid(4, 16), search=search).scale
        assert torch.equal(scale, scale.bfloat16().float())


def test_zeros_stay_zero() -> None:
    for symmetric in (True, False):
        assert not quantizers.fake_quantize(torch.zeros(2, 32), Grid(4, 16, symmetric)).any()
    assert not quantizers.fake_quantize_codebook(torch.zeros(2, 32), "nf4", double=True).any()


def test_the_straight_through_gradient_is_the_identitys(weight: torch.Tensor) -> None:
    weight = weight.clone().requires_grad_()
    out = quantizers.straight_through(weight, Grid(4, 16))
    torch.testing.assert_close(
        out, quantizers.fake_quantize(weight.detach(), Grid(4, 16)), rtol=1e-6, atol=1e-8
    )
    (out * 3).sum().backward()
    assert bool((weight.grad == 3).all())


def test_token_scales_are_dynamic() -> None:
    inputs = torch.tensor([[1.0, 127.5], [1000.0, 127500.0]])
    rounded = quantizers.fake_quantize_rows(inputs)
    torch.testing.assert_close(rounded[1], rounded[0] * 1000)
    torch.testing.assert_close(rounded[0], torch.tensor([1.0, 127.0]))


def test_bits_per_weight() -> None:
    assert Grid(4, 64).bits_per_weight(576) == 4.25
    assert Grid(4, 64, symmetric=False).bits_per_weight(576) == 4 + 20 / 64
    assert Grid(8).bits_per_weight(576) == 8 + 16 / 576


def test_groups_that_work() -> None:
    assert quantizers.working_groups(576) == [16, 32, 64]
    with pytest.raises(ValueError, match="576 columns are no multiple of the group size 128"):
        quantizers.fit(torch.zeros(1, 576), Grid(4, 128))


def test_relative_error_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, inputs = torch.randn(5, 8, generator=generator), torch.randn(20, 8, generator=generator)
    quantized = weight + 0.01 * torch.randn(5, 8, generator=generator)
    expected = ((inputs @ (weight - quantized).T).square().sum() / (inputs @ weight.T).square().sum()).item()
    assert math.isclose(
        quantizers.relative_error(weight, quantized, inputs.T @ inputs), expected, rel_tol=1e-4
    )
