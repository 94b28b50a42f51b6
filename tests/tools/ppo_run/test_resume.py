"""A run killed at any moment and started again gives the bytes of the run that was not."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, forked

from .conftest import contents
from .setup import build_reward_model

#: Draws from the global generators of Python, NumPy and torch, whose states are then part of a run.
RANDOM_REWARD = """
import random, numpy, torch

def score(prompts, completions):
    noise = random.random() + numpy.random.rand() + torch.rand(()).item()
    return [len(c) / 10 + noise for c in completions]
"""


def arguments(prompts: Path, heldout: Path, reward: str, method: str) -> list[object]:
    sizes = ["--updates", "6", "--checkpoint-every", "1", "--eval-every", "2", "--kl-target", "0.1"]
    rates = ["--learning-rate", "0.003", "--minibatches", "2", "--ppo-epochs", "2", "--samples-every", "2"]
    return [prompts, "--heldout", heldout, "-r", reward, "--method", method, "--save-value", *sizes, *rates]


@pytest.mark.parametrize("method", ["lora", "full", "prefix"])
def test_row_31_resumed_equals_uninterrupted(
    method: str, ppo: Callable[..., Result], prompts: Path, heldout: Path, workdir: Path, tiny_model: Path
) -> None:
    """Policy, value, optimiser, generators, KL coefficient, prompts and episode, out of checkpoints alone."""
    Path("noisy_reward.py").write_text(RANDOM_REWARD)
    reward = "noisy_reward:score"
    if method == "full":
        reward = str(build_reward_model(workdir / "rm", tiny_model))
    args = arguments(prompts, heldout, reward, method)
    code, writes = forked(lambda: ppo(*args))
    assert code == 0
    expected = contents(workdir / "out")
    shutil.rmtree(workdir / "out")
    shutil.rmtree(workdir / ".work")

    chooser = random.Random(method)
    kills = 0
    for moment in sorted(chooser.sample(range(20, writes - 5), 3)):  # each goes on from the one before
        code, _ = forked(lambda: ppo(*args), kill_at=moment)
        kills += code == -signal.SIGKILL
        assert code in (-signal.SIGKILL, 0)
        if not (workdir / "out").exists():
            continue
        assert contents(workdir / "out") == expected
    assert kills >= 1
    resumed = ppo(*args)
    assert resumed.code == 0, resumed.stderr
    assert contents(workdir / "out") == expected


def test_a_run_goes_on_and_does_not_start_anew(
    ppo: Callable[..., Result], prompts: Path, heldout: Path, workdir: Path
) -> None:
    """Killed in its last write, a run has one update left; with another parameter it starts anew."""
    args = arguments(prompts, heldout, "builtin:length", "lora")
    code, writes = forked(lambda: ppo(*args))
    assert code == 0
    shutil.rmtree(workdir / "out")
    shutil.rmtree(workdir / ".work")
    code, _ = forked(lambda: ppo(*args), kill_at=writes - 3)
    assert code == -signal.SIGKILL
    assert not (workdir / "out").exists()
    other = ppo(*args, "--kl-coef", "0.2", output="out")
    assert "going on" not in other.stderr
    shutil.rmtree(workdir / "out")
    code, _ = forked(lambda: ppo(*args), kill_at=writes - 3)
    assert code == -signal.SIGKILL
    resumed = ppo(*args)
    assert resumed.code == 0, resumed.stderr
    assert "going on from update 5" in resumed.stderr
