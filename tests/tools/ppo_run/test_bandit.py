"""On a one-step bandit the loop reaches the optimum that theory gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, write_jsonl
from transformers import AutoModelForCausalLM

from .bandit import answers, best_of_n, build_bandit, optimum, point
from .conftest import log_of

LEARN = [
    "--updates",
    "60",
    "--batch-size",
    "256",
    "--micro-batch-size",
    "256",
    "--rollout-batch-size",
    "256",
    "--max-new-tokens",
    "1",
    "--missing-eos",
    "none",
    "--kl-coef",
    "0.3",
    "--temperature",
    "0.7",
    "--value-learning-rate",
    "0.01",
    "--samples-every",
    "0",
]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_row_35_the_optimum(seed: int, ppo: Callable[..., Result], workdir: Path) -> None:
    """π* ∝ π_ref · exp(r / β), both at the sampling temperature, within 0.02 total variation."""
    model = build_bandit(workdir / "bandit")
    records = write_jsonl(workdir / "go.jsonl", [{"prompt": "go"}])
    args = [records, "-r", "bandit:reward", "--method", "full", "--learning-rate", "0.01", *LEARN]
    done = ppo(*args, "--seed", seed, model=model)
    assert done.code == 0, done.stderr
    reference = answers(AutoModelForCausalLM.from_pretrained(model), 0.7)
    best = optimum(reference, 0.3)
    assert (reference - best).abs().sum() / 2 > 0.5
    found = answers(AutoModelForCausalLM.from_pretrained(workdir / "out"), 0.7)
    assert (found - best).abs().sum() / 2 < 0.02
    assert all(line["first_ratio_deviation"] == 0.0 for line in log_of(workdir / "out"))


@pytest.mark.parametrize("kl_coef", [0.6, 0.15])
def test_frontier_is_on_or_above_best_of_n(kl_coef: float, ppo: Callable[..., Result], workdir: Path) -> None:
    """The regularised optimum has the most reward at its KL, so what PPO finds is not below best-of-n's curve."""
    model = build_bandit(workdir / "bandit")
    records = write_jsonl(workdir / "go.jsonl", [{"prompt": "go"}])
    args = [records, "-r", "bandit:reward", "--method", "full", "--learning-rate", "0.01", *LEARN]
    done = ppo(*args, "--kl-coef", kl_coef, model=model)
    assert done.code == 0, done.stderr
    reference = answers(AutoModelForCausalLM.from_pretrained(model), 0.7)
    kl, reward = point(answers(AutoModelForCausalLM.from_pretrained(workdir / "out"), 0.7), reference)
    curve = [point(best_of_n(reference, n), reference) for n in range(1, 65)]
    (kl_a, reward_a), (kl_b, reward_b) = next(
        (a, b) for a, b in itertools.pairwise(curve) if a[0] <= kl < b[0]
    )
    at_equal_kl = reward_a + (reward_b - reward_a) * (kl - kl_a) / (kl_b - kl_a)
    assert kl > 0.1
    assert reward > at_equal_kl - 0.005
