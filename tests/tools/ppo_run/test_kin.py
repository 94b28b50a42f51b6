"""RLOO and GRPO by the same command: the same prompts, rewards, log and artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, write_jsonl
from transformers import AutoModelForCausalLM

from .bandit import answers, build_bandit, optimum
from .conftest import log_of


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("algo", ["rloo", "grpo"])
def test_trains(
    algo: str, method: str, ppo: Callable[..., Result], prompts: Path, heldout: Path, workdir: Path
) -> None:
    args = [prompts, "--heldout", heldout, "-r", "builtin:length", "--algo", algo, "--group-size", "2"]
    args += ["--batch-size", "8", "--method", method, "--learning-rate", "0.001"]
    done = ppo(*args)
    assert done.code == 0, done.stderr
    log = log_of(workdir / "out")
    assert [line["update"] for line in log] == [1, 2, 3]
    assert log[-1]["episodes"] == 24
    manifest = json.loads((workdir / "out/artifact.json").read_text())
    assert manifest["kind"] == ("model" if method == "full" else "adapter")
    assert {"heldout_reward_before", "heldout_reward", "heldout_gain", "heldout_kl"} <= manifest[
        "metrics"
    ].keys()
    first = (workdir / "out/artifact.json").read_bytes()
    again = ppo(*args, "--force")
    assert again.code == 0, again.stderr
    assert (workdir / "out/artifact.json").read_bytes() == first


@pytest.mark.slow
def test_rloo_moves_towards_the_optimum_of_the_bandit(ppo: Callable[..., Result], workdir: Path) -> None:
    model = build_bandit(workdir / "bandit")
    records = write_jsonl(workdir / "go.jsonl", [{"prompt": "go"}])
    args = (
        "--algo rloo --updates 60 --batch-size 128 --micro-batch-size 128 --group-size 64 --max-new-tokens 1 "
    )
    args += "--missing-eos none --kl-coef 0.3 --temperature 0.7 --method full --learning-rate 0.01"
    done = ppo(records, "-r", "bandit:reward", *args.split(), "--samples-every", "0", model=model)
    assert done.code == 0, done.stderr
    best = optimum(answers(AutoModelForCausalLM.from_pretrained(model), 0.7), 0.3)
    found = answers(AutoModelForCausalLM.from_pretrained(workdir / "out"), 0.7)
    assert (found - best).abs().sum() / 2 < 0.1


def test_what_only_ppo_has_is_refused(ppo: Callable[..., Result], prompts: Path) -> None:
    for args, says in [
        (["--kl-budget", "1"], "--kl-budget goes with --algo ppo alone"),
        (["--batch-size", "7"], "needs a --batch-size (7)"),
    ]:
        done = ppo(prompts, "-r", "builtin:length", "--algo", "grpo", "--group-size", "2", *args)
        assert (done.code, says in done.error) == (2, True), done.stderr
