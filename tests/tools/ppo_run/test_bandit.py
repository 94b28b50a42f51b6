"""On a one-step bandit the loop reaches the optimum that theory gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, write_jsonl
from transformers import AutoModelForCausalLM

from .bandit import answers, build_bandit, optimum
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
