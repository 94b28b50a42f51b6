"""Gram matrices against the whole product, the factor against the inverse."""

from __future__ import annotations

import pytest

from tuneutils.shared.hessian import add_gram, inverse_factor

# isort: split
import torch


def inputs(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
    return torch.randn(4 * columns, columns, generator=generator) @ mix


@pytest.mark.parametrize("columns", [1, 96, 256, 300, 520])
def test_batches_add_up_to_the_whole_product(columns: int) -> None:
    rows = inputs(columns).double()
    total = torch.zeros(columns, columns, dtype=torch.float64)
    for part in rows.split(columns + 1):
        add_gram(total, part)
    torch.testing.assert_close(total, rows.T @ rows)
    assert torch.equal(total, total.T)


def test_the_factor_is_that_of_the_inverse() -> None:
    rows = inputs(96, seed=1)
    gram = rows.T @ rows
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(96)
    upper = inverse_factor(gram, 0.01).double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)


def test_a_column_without_inputs_stands_alone() -> None:
    gram = torch.tensor([[4.0, 0, 2], [0, 0, 0], [2, 0, 9]])
    upper = inverse_factor(gram, 0.0)
    expected = torch.linalg.inv(torch.tensor([[4.0, 0, 2], [0, 1, 0], [2, 0, 9]]))
    torch.testing.assert_close(upper.T @ upper, expected)
