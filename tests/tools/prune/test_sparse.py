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
    made = Inputs.empty(columns)
    made.add(x[:77])
    made.add(x[77:])
    return x, made


def test_inputs_are_summed_over_batches() -> None:
    x, made = inputs()
    torch.testing.assert_close(made.squares, (x**2).sum(0))
    torch.testing.assert_close(made.products, x.T @ x)
    some = Inputs.empty(16, every=3)
    some.add(x)
    torch.testing.assert_close(some.squares, made.squares)
    torch.testing.assert_close(some.products, x[::3].T @ x[::3])


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
    weight, seen = random(3, 6), Inputs(torch.linspace(0.1, 4, 6), torch.empty(0))
    mask = wanda_mask(weight, seen, 0.5, DENSE)
    cost = weight**2 * seen.squares
    for row in range(3):
        best = min(cost[row, list(c)].sum() for c in itertools.combinations(range(6), 3))
        torch.testing.assert_close(cost[row][mask[row]].sum(), best)


def test_sparsegpt_beats_wanda_which_beats_magnitude() -> None:
    _, seen = inputs(columns=32)
    weight = random(24, 32)
    for pattern in (DENSE, TWO_FOUR):
        ours = sparsegpt([weight], seen, [0.5], pattern, 0.01)[0]
        errors = [output_error(weight, ours, seen)]
        for mask in (wanda_mask(weight, seen, 0.5, pattern), magnitude_mask(weight, 0.5, pattern)):
            errors.append(output_error(weight, weight.masked_fill(mask, 0), seen))
        assert errors == sorted(errors)
        assert abs(float((ours == 0).float().mean()) - 0.5) < 1e-6


def test_sparsegpt_with_one_column_left_out_is_least_squares() -> None:
    """When only the last columns go nothing is left to adjust; when the first goes, the rest solve for it."""
    x, seen = inputs(columns=4)
    weight = torch.tensor([[1e-4, 1.0, -2.0, 0.5]])  # the first is by far the cheapest
    ours = sparsegpt([weight], seen, [0.25], DENSE, 0.0)[0]
    target = x @ weight[0]
    best = torch.linalg.lstsq(x[:, 1:], target[:, None]).solution[:, 0]
    assert ours[0, 0] == 0
    torch.testing.assert_close(ours[0, 1:], best, rtol=1e-3, atol=1e-4)


def test_sparsegpt_of_uncorrelated_inputs_changes_nothing_else() -> None:
    seen = Inputs(torch.ones(8), torch.eye(8) * 50)
    weight = random(5, 8)
    ours = sparsegpt([weight], seen, [0.5], DENSE, 0.0)[0]
    mask = magnitude_mask(weight, 0.5, DENSE)
    torch.testing.assert_close(ours, weight.masked_fill(mask, 0))


def test_sparsegpt_works_across_blocks_and_with_dead_columns() -> None:
    x = random(400, 300)
    x[:, 7] = 0
    seen = Inputs.empty(300)
    seen.add(x)
    weight = random(10, 300)
    ours = sparsegpt([weight], seen, [0.5], TWO_FOUR, 0.01)[0]
    assert ours.isfinite().all()
    assert not ours[:, 7].any()
    assert ours.view(10, 75, 4).ne(0).sum(-1).le(2).all()


def test_matrices_with_the_same_inputs_do_not_interact() -> None:
    x = random(400, 160)
    seen = Inputs.empty(160)
    seen.add(x @ (torch.eye(160) + 0.3 * random(160, 160, seed=2)))
    weights = [random(10, 160), random(7, 160, seed=5)]
    for pattern in (DENSE, TWO_FOUR):
        together = sparsegpt(weights, seen, [0.3, 0.6], pattern, 0.01)
        for ours, weight, share in zip(together, weights, (0.3, 0.6), strict=True):
            torch.testing.assert_close(ours, sparsegpt([weight], seen, [share], pattern, 0.01)[0])
            if pattern is DENSE:
                assert float((ours == 0).float().mean()) == pytest.approx(share, abs=1e-2)


def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column() -> None:
    """2:4 by its definition: the inverse of what is left of H is kept, in float64 (equations 3 to 5)."""
    x = random(500, 160) @ (torch.eye(160) + 0.3 * random(160, 160, seed=2))
    seen = Inputs.empty(160)
    seen.add(x)
    weight = random(6, 160, seed=3)
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(160)
    inverse, w = torch.linalg.inv(hessian), weight.double().clone()
    mask = torch.zeros_like(w, dtype=torch.bool)
    for i in range(160):
        if i % 4 == 0:  # [H⁻¹]_jj with the columns before j taken out, for the four columns
            left, cost = inverse.clone(), []
            for j in range(i, i + 4):
                cost.append(w[:, j].square() / left[j, j])
                left = left - torch.outer(left[:, j], left[j]) / left[j, j]
            mask[:, i : i + 4] = lowest(torch.stack(cost, 1), 0, TWO_FOUR)
        error = torch.where(mask[:, i], w[:, i], 0) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        w[:, i].masked_fill_(mask[:, i], 0)
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    torch.testing.assert_close(
        sparsegpt([weight], seen, [0.5], TWO_FOUR, 0.01)[0], w.float(), rtol=1e-3, atol=1e-4
    )


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, seen = inputs()
    before, after = random(5, 16), random(5, 16, seed=9)
    expected = ((x @ (before - after).T) ** 2).sum() / ((x @ before.T) ** 2).sum()
    assert output_error(before, after, seen) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "2/4", "dense"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(ToolError, match="--pattern"):
        Pattern.parse(text)
