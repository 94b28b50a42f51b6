"""The doctor finds what it should, and nothing on a healthy setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support import Result, build_tiny_model
from transformers import AutoTokenizer, GenerationConfig

from .setup import build_reward_model


def statuses(done: Result) -> dict[str, str]:
    return {c["name"]: c["status"] for c in json.loads(done.stdout)["checks"]}


def test_a_healthy_setting(
    ppo: Callable[..., Result], prompts: Path, tiny_model: Path, workdir: Path
) -> None:
    folder = build_reward_model(workdir / "rm", tiny_model)
    before = sorted(workdir.iterdir())
    done = ppo(prompts, "-r", folder, "--json", "--max-new-tokens", "90", command="doctor")
    assert done.code == 0, done.stderr
    found = statuses(done)
    assert "fail" not in found.values()
    assert {
        "pad-token",
        "ratio",
        "sampler",
        "reference",
        "constant-reward",
        "read-out",
        "eos",
    } <= found.keys()
    assert sorted(workdir.iterdir()) == before
    shown = ppo(prompts, "-r", folder, command="doctor").stdout
    assert "ok    ratio: first probability ratio is 1 to within 0.0e+00" in shown


def test_a_constant_reward(ppo: Callable[..., Result], prompts: Path) -> None:
    Path("flat_reward2.py").write_text("def score(prompts, completions): return [0.5] * len(prompts)\n")
    done = ppo(prompts, "-r", "flat_reward2:score", "--json", command="doctor")
    assert done.code == 1
    assert "checks failed: constant-reward" in done.error
    assert statuses(done)["constant-reward"] == "fail"


def test_pad_is_eos_and_a_truncating_generation_config(
    ppo: Callable[..., Result], prompts: Path, tmp_path: Path
) -> None:
    model = build_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    GenerationConfig(do_sample=True, top_k=5, top_p=0.8).save_pretrained(model)
    done = ppo(prompts, "-r", "builtin:length:3", command="doctor", model=model)
    assert done.code == 0, done.stderr
    assert "warn  pad-token: the model pads with its EOS token '<|im_end|>'; '<|pad|>' is used" in done.stdout
    assert "top_k=5, top_p=0.8 of the model's own is ignored" in done.stdout


def test_a_reward_out_of_scale(ppo: Callable[..., Result], prompts: Path) -> None:
    Path("large_reward.py").write_text(
        "def score(prompts, completions): return [1000.0 * len(c) for c in completions]\n"
    )
    done = ppo(prompts, "-r", "large_reward:score", command="doctor")
    assert done.code == 0, done.stderr
    assert "warn  reward-scale: " in done.stdout


def test_responses_that_never_end(ppo: Callable[..., Result], prompts: Path) -> None:
    done = ppo(prompts, "-r", "builtin:length", "--max-new-tokens", "1", command="doctor")
    assert "warn  eos: 0 of 6 responses end in EOS within 1 tokens" in done.stdout
