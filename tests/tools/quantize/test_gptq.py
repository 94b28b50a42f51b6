"""GPTQ against rounding to nearest, the paper's own order of work, and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from tuneutils.shared.quantizers import Grid, fake_quantize, fit, from_codes, relative_error
from tuneutils.tools.quantize.gptq import gptq


def problem(seed: int, rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Gram matrix of correlated inputs of uneven power."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
    inputs = torch.randn(400, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def rounded(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, **how: float) -> torch.Tensor:
    codes, scales = gptq(weight, gram, grid, **how)
    assert codes.dtype == torch.int8
    assert codes.min() >= grid.low
    assert codes.max() <= grid.high
    return from_codes(codes, grid, scales)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_weighted_error_is_below_rounding_in_every_layer(symmetric: bool, act_order: bool) -> None:
    grid = Grid(4, 32, symmetric)
    for seed in range(8):
        weight, gram = problem(seed)
        ours = relative_error(weight, rounded(weight, gram, grid, act_order=act_order), gram)
        nearest = fake_quantize(weight, grid, fit(weight, grid, search=True, importance=gram.diagonal()))
        assert ours < 0.9 * relative_error(weight, nearest, gram)


@pytest.mark.parametrize("act_order", [True, False])
def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(act_order: bool) -> None:
    weight, _ = problem(0)
    grid = Grid(4, 32, False)
    nearest = fake_quantize(weight, grid, fit(weight, grid, search=True))
    assert torch.equal(rounded(weight, torch.eye(96), grid, act_order=act_order, damping=0.0), nearest)


def test_lazy_blocks_give_what_column_by_column_gives() -> None:
    """Algorithm 1 without blocks, in float64, from the inverse itself (equations 2 and 3)."""
    weight, gram = problem(3, rows=8, columns=160)
    grid = Grid(3, 32)
    codes, scales = gptq(weight, gram, grid, act_order=False, damping=0.01)
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(160)
    work, inverse = weight.double().clone(), torch.linalg.inv(damped)
    expected = torch.empty_like(codes)
    for i in range(160):
        scale = scales.scale[:, i // 32].double()
        expected[:, i] = (work[:, i] / scale).round().clamp(grid.low, grid.high).to(torch.int8)
        error = (work[:, i] - expected[:, i].double() * scale) / inverse[i, i]
        work -= error[:, None] * inverse[i]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (codes == expected).double().mean() > 0.995  # rounding at a tie may differ between precisions


def test_close_to_the_best_of_all_codes() -> None:
    """Four weights on three bits: every one of 8^4 choices."""
    grid = Grid(3, None)
    for seed in range(5):
        weight, gram = problem(seed, rows=1, columns=4)
        ours = relative_error(weight, rounded(weight, gram, grid, damping=1e-6), gram)
        scale = fit(weight, grid, search=True, importance=gram.diagonal()).scale
        choices = torch.tensor(list(itertools.product(range(grid.low, grid.high + 1), repeat=4))) * scale
        difference = weight - choices
        errors = ((difference @ gram) * difference).sum(1) / ((weight @ gram) * weight).sum()
        nearest = relative_error(weight, fake_quantize(weight, grid), gram)
        assert float(errors.min()) <= ours * (1 + 1e-4)
        assert ours <= nearest * (1 + 1e-4)


def test_columns_that_never_see_an_input_are_zero() -> None:
    weight, gram = problem(2)
    gram[5], gram[:, 5] = 0, 0
    assert not rounded(weight, gram, Grid(4, 32))[:, 5].any()


def test_its_own_grid_stays() -> None:
    weight, gram = problem(4)
    grid = Grid(4, 32)
    once = fake_quantize(weight, grid, fit(weight, grid, search=True, importance=gram.diagonal()))
    assert torch.equal(rounded(once, gram, grid), once)
