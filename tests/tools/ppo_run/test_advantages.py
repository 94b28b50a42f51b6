"""Rewards, advantages and returns against sums written out."""

from __future__ import annotations

import math

import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from torch import Tensor

from tuneutils.tools.ppo_run.advantages import (
    adapted_kl_coef,
    explained_variance,
    generalised_advantages,
    token_rewards,
    whiten,
    with_missing_eos,
)

LENGTHS = (5, 1, 7, 3)


@pytest.fixture
def mask() -> Tensor:
    return (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).double()


def noise(seed: int) -> Tensor:
    """Values everywhere, on pads too: nothing there may matter."""
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_row_19_gae_equals_its_definition(mask: Tensor, gamma: float, lam: float) -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} - V_t and V = 0 past the end, in O(T²)."""
    rewards, values = noise(0), noise(1)
    advantages, returns = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    for row, n in enumerate(LENGTHS):
        r, v = rewards[row].tolist(), values[row].tolist()
        v_next = [*v[1:n], 0.0]
        delta = [r[t] + gamma * v_next[t] - v[t] for t in range(n)]
        for t in range(7):
            want = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
            assert advantages[row, t].item() == pytest.approx(want, abs=1e-12)
            # Row 20: returns are advantages plus values, neither whitened.
            assert returns[row, t].item() == pytest.approx(want + v[t] if t < n else 0.0, abs=1e-12)


def test_with_lambda_1_the_return_is_the_sum_of_rewards(mask: Tensor) -> None:
    rewards = noise(0)
    _, returns = generalised_advantages(rewards, noise(1), mask, gamma=1.0, lam=1.0)
    for row, n in enumerate(LENGTHS):
        for t in range(n):
            assert returns[row, t].item() == pytest.approx(rewards[row, t:n].sum().item())


@pytest.mark.parametrize("beta", [0.0, 0.05, 2.0])
def test_row_15_rewards_sum_to_the_score_less_the_kl(mask: Tensor, beta: float) -> None:
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logprobs, reference = noise(2), noise(3)
    rewards = token_rewards(scores, logprobs, reference, mask, beta)
    for row, n in enumerate(LENGTHS):
        kl = [logprobs[row, t].item() - reference[row, t].item() for t in range(n)]
        assert rewards[row].sum().item() == pytest.approx(scores[row].item() - beta * sum(kl))
        for t in range(n):  # Row 16: k1 a token, and the score on the last one.
            want = -beta * kl[t] + (scores[row].item() if t == n - 1 else 0.0)
            assert rewards[row, t].item() == pytest.approx(want)
        assert rewards[row, n:].abs().sum() == 0


def test_row_21_whitened_advantages_have_mean_0_and_std_1(mask: Tensor) -> None:
    made = whiten(noise(4) * 3 + 5, mask)
    real = made[mask.bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-12)
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert made[~mask.bool()].abs().sum() == 0


def test_row_21_equal_advantages_stay_finite(mask: Tensor) -> None:
    assert whiten(torch.full((4, 7), 2.0), mask).abs().max() < 1e-3


def test_row_22_whitened_rewards_keep_their_mean(mask: Tensor) -> None:
    values = noise(5) * 3 + 5
    real = whiten(values, mask, shift_mean=False)[mask.bool()]
    assert real.mean().item() == pytest.approx(values[mask.bool()].mean().item())
    assert real.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_row_14_missing_eos() -> None:
    scores, finished = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([True, False, False])
    assert with_missing_eos(scores, finished, "replace", 1.0).tolist() == [2.0, -1.0, -1.0]
    assert with_missing_eos(scores, finished, "subtract", 1.0).tolist() == [2.0, 1.0, -4.0]
    assert with_missing_eos(scores, finished, "none", 1.0).tolist() == [2.0, 2.0, -3.0]


def test_row_30_adaptive_kl() -> None:
    """β ← β (1 + clip(kl / target - 1, ±.2) · n / horizon), with Ziegler et al.'s constants."""
    assert adapted_kl_coef(0.2, 6.6, 6.0, 256, 10_000) == pytest.approx(0.2 * (1 + 0.1 * 256 / 10_000))
    assert adapted_kl_coef(0.2, 600.0, 6.0, 256, 10_000) == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    assert adapted_kl_coef(0.2, -5.0, 6.0, 256, 10_000) == pytest.approx(0.2 * (1 - 0.2 * 256 / 10_000))


def test_explained_variance(mask: Tensor) -> None:
    returns = noise(6)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.zeros(4, 7), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4, 7), mask) == 0.0
    assert not math.isnan(explained_variance(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)))
