"""Two processes (gloo, on the CPU) give the result of one with the same global batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import Result

from .conftest import log_of
from .setup import build_reward_model


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("reward", ["builtin", "model"])
def test_two_processes_equal_one(
    method: str,
    reward: str,
    world: Callable[..., list[Result]],
    ppo: Callable[..., Result],
    prompts: Path,
    heldout: Path,
    workdir: Path,
    tiny_model: Path,
) -> None:
    """Prompts, draws, minibatches, whitening and the token mean are those of the whole batch, here of 5.

    The value model is a head on the policy, or starts from the reward model.
    """
    spec = "builtin:length:4"
    if reward == "model":
        spec = str(build_reward_model(workdir / "rm", tiny_model, mean=0.5, std=2.0))
    args = [prompts, "--heldout", heldout, "-r", spec, "--method", method, "--learning-rate", "0.001"]
    args += [
        "--batch-size",
        5,
        "--minibatches",
        2,
        "--eval-every",
        1,
        "--kl-target",
        1,
        "--save-value",
    ]
    before = {p.name for p in workdir.iterdir() if p.is_dir()}
    both = world(2, *args)
    assert [r.code for r in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[1].stderr == ""
    assert {p.name for p in workdir.iterdir() if p.is_dir()} == before | {".work", "out"}
    one = ppo(*args, output="one")
    assert one.code == 0, one.stderr
    for ours, wanted in zip(log_of(workdir / "out"), log_of(workdir / "one"), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    policy = "model" if method == "full" else "adapter_model"
    for name in (f"{policy}.safetensors", "value.safetensors"):
        ours_weights, weights = load_file(workdir / "out" / name), load_file(workdir / "one" / name)
        assert ours_weights.keys() == weights.keys()
        for key, weight in weights.items():
            assert torch.allclose(ours_weights[key], weight, rtol=1e-3, atol=1e-5), key
    samples = [
        [json.loads(line) for line in (workdir / name / "samples.jsonl").read_text().splitlines()]
        for name in ("out", "one")
    ]
    for ours, wanted in zip(*samples, strict=True):  # a reward model's sums depend on what it scores together
        assert ours == {**wanted, "reward": pytest.approx(wanted["reward"], rel=1e-5, abs=1e-6)}


def test_an_error_in_one_process_ends_all(
    world: Callable[..., list[Result]], prompts: Path, workdir: Path
) -> None:
    """A reward that fails for one prompt reaches only the process that has it; the other must not wait."""
    (workdir / "some_nan.py").write_text(
        "def score(prompts, completions):\n"
        "    return [float('nan') if p.endswith('7.') else len(c) for p, c in zip(prompts, completions)]\n"
    )
    both = world(2, prompts, "-r", "some_nan:score", "--batch-size", 10)
    assert [r.code for r in both] == [65, 65], both[0].stderr + both[1].stderr
    assert "prompts.jsonl:8: the reward is nan" in both[0].error
