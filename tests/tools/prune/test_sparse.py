"""Masks and SparseGPT against brute force and closed forms."""

from __future__ import annotations

import itertools

import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.tools.prune.sparse import (
    Inputs,
    Pattern,
    lowest,
    magnitude_mask,
    output_error,
    sparsegpt,
    wanda_mask,
)

# isort: split
import torch
from torch import Tensor

DENSE = Pattern()
TWO_FOUR = Pattern(2, 4)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = 200, columns: int = 16, seed: int = 1) -> tuple[Tensor, Inputs]:
    """Correlated columns of very different sizes."""
    x = random(rows, columns, seed=seed) @ (
        torch.eye(columns) + 0.4 * random(columns, columns, seed=seed + 1)
    )
    x = x * torch.linspace(0.1, 3, columns)
    made = Inputs.empty(columns, products=True)
    made.add(x[:77])
    made.add(x[77:])
    return x, made


def test_inputs_are_summed_over_batches() -> None:
    x, made = inputs()
    torch.testing.assert_close(made.squares, (x**2).sum(0))
    torch.testing.assert_close(made.products, x.T @ x)
    assert made.tokens == 200


def test_the_lowest_of_each_row_go() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 5.0, 5.0, 1.0]])
    assert lowest(scores, 0.5, DENSE).tolist() == [[False, True, False, True], [True, False, False, True]]


def test_two_of_four_stay_in_each_group_and_they_are_the_best_two() -> None:
    scores = random(6, 16).abs()
    mask = lowest(scores, 0.9, TWO_FOUR)  # the share is the pattern's
    groups = scores.view(6, 4, 4)
    best = max_of_pairs(groups)
    kept = (groups * ~mask.view(6, 4, 4)).sum(-1)
    assert mask.view(6, 4, 4).sum(-1).eq(2).all()
    torch.testing.assert_close(kept, best)


def max_of_pairs(groups: Tensor) -> Tensor:
    pairs = [groups[..., list(pair)].sum(-1) for pair in itertools.combinations(range(4), 2)]
    return torch.stack(pairs).amax(0)


def test_magnitude_takes_the_smallest_of_the_whole_matrix() -> None:
    weight = random(8, 16)
    mask = magnitude_mask(weight, 0.25, DENSE)
    assert int(mask.sum()) == 32
    assert weight[mask].abs().max() <= weight[~mask].abs().min()


def test_wanda_is_optimal_for_uncorrelated_inputs() -> None:
    """Then the error is the sum of w² ‖x‖² of what goes: brute force over all choices in a row."""
    weight, seen = random(3, 6), Inputs(torch.linspace(0.1, 4, 6))
    mask = wanda_mask(weight, seen, 0.5, DENSE)
    cost = weight**2 * seen.squares
    for row in range(3):
        best = min(cost[row, list(c)].sum() for c in itertools.combinations(range(6), 3))
        torch.testing.assert_close(cost[row][mask[row]].sum(), best)


def test_sparsegpt_beats_wanda_which_beats_magnitude() -> None:
    _, seen = inputs(columns=32)
    weight = random(24, 32)
    for pattern in (DENSE, TWO_FOUR):
        ours = sparsegpt(weight, seen, 0.5, pattern, 0.01)
        errors = [output_error(weight, ours, seen)]
        for mask in (wanda_mask(weight, seen, 0.5, pattern), magnitude_mask(weight, 0.5, pattern)):
            errors.append(output_error(weight, weight.masked_fill(mask, 0), seen))
        assert errors == sorted(errors)
        assert abs(float((ours == 0).float().mean()) - 0.5) < 1e-6


def test_sparsegpt_with_one_column_left_out_is_least_squares() -> None:
    """When only the last columns go nothing is left to adjust; when the first goes, the rest solve for it."""
    x, seen = inputs(columns=4)
    weight = torch.tensor([[1e-4, 1.0, -2.0, 0.5]])  # the first is by far the cheapest
    ours = sparsegpt(weight, seen, 0.25, DENSE, 0.0)
    target = x @ weight[0]
    best = torch.linalg.lstsq(x[:, 1:], target[:, None]).solution[:, 0]
    assert ours[0, 0] == 0
    torch.testing.assert_close(ours[0, 1:], best, rtol=1e-3, atol=1e-4)


def test_sparsegpt_of_uncorrelated_inputs_changes_nothing_else() -> None:
    seen = Inputs(torch.ones(8), torch.eye(8) * 50, 100)
    weight = random(5, 8)
    ours = sparsegpt(weight, seen, 0.5, DENSE, 0.0)
    mask = magnitude_mask(weight, 0.5, DENSE)
    torch.testing.assert_close(ours, weight.masked_fill(mask, 0))


def test_sparsegpt_works_across_blocks_and_with_dead_columns() -> None:
    x = random(400, 300)
    x[:, 7] = 0
    seen = Inputs.empty(300, products=True)
    seen.add(x)
    weight = random(10, 300)
    ours = sparsegpt(weight, seen, 0.5, TWO_FOUR, 0.01)
    assert ours.isfinite().all()
    assert not ours[:, 7].any()
    assert ours.view(10, 75, 4).ne(0).sum(-1).le(2).all()


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, seen = inputs()
    before, after = random(5, 16), random(5, 16, seed=9)
    expected = ((x @ (before - after).T) ** 2).sum() / ((x @ before.T) ** 2).sum()
    assert output_error(before, after, seen) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "2/4", "dense"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(ToolError, match="--pattern"):
        Pattern.parse(text)
