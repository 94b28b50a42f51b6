"""``ppo-run compare``: policies side by side."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bandit import word_tokenizer
from support import Result, invoke, load_tool, write_jsonl

from tuneutils.tools.ppo_run.comparison import best_of_n, over_optimised

Compare = Callable[..., Result]


@pytest.fixture
def compare(workdir: Path, heldout: Path) -> Compare:
    def call(
        *policies: Any, output: str = "report", reward: str = "builtin:length:5", **options: Any
    ) -> Result:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        common = (
            "--prompts",
            heldout,
            "-r",
            reward,
            "--max-new-tokens",
            8,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        )
        args = map(str, (*policies, *common, *flags, "-o", output))
        return invoke(load_tool("ppo-run"), "compare", *args)

    return call


def ok(result: Result) -> None:
    assert result.code == 0, result.stderr


def _report(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workdir / "report" / "report.json").read_text())
    return found


def test_best_of_n_counts_every_subset() -> None:
    rng = np.random.default_rng(0)
    picked_by, gold = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    found = best_of_n({"reward": picked_by.tolist(), "gold": gold.tolist()}, seed=0)
    assert [row["n"] for row in found] == [1, 2, 4, 5]
    for row in found:
        for name, values in (("reward", picked_by), ("gold", gold)):
            best = [
                values[prompt, max(chosen, key=lambda i: picked_by[prompt, i])]
                for prompt in range(3)
                for chosen in combinations(range(5), row["n"])
            ]
            assert row[name]["value"] == pytest.approx(np.mean(best))
        assert row["kl"] == pytest.approx(math.log(row["n"]) - (row["n"] - 1) / row["n"])


def test_equals_share_their_worth() -> None:
    (one, _, _) = best_of_n({"reward": [[1.0] * 4], "gold": [[0.0, 0.0, 0.0, 4.0]]}, seed=0)
    (*_, four) = best_of_n({"reward": [[1.0] * 4], "gold": [[0.0, 0.0, 0.0, 4.0]]}, seed=0)
    assert one["gold"]["value"] == four["gold"]["value"] == 1.0


def test_a_policy_equals_itself(compare: Compare, tiny_model: Path, workdir: Path) -> None:
    write_jsonl(workdir / "general.jsonl", [{"text": "a text of some words"}, {"text": "and one more"}])
    ok(compare(f"a={tiny_model}", f"b={tiny_model}", general="general.jsonl", gold="builtin:length"))
    first, second = _report(workdir)["policies"]
    against = second["against_first"]
    for name in ("reward", "gold", "bits_per_byte"):
        assert against[name]["value"] == against[name]["low"] == against[name]["high"] == 0
    assert against["reward_win_rate"]["value"] == 0.5
    assert first["kl"]["value"] == second["kl"]["value"] == 0


def test_what_changed_is_measured(
    compare: Compare, ppo: Callable[..., Result], prompts: Path, tiny_model: Path, workdir: Path
) -> None:
    ok(
        ppo(
            "-r",
            "builtin:length:3",
            "--learning-rate",
            "0.05",
            "--method",
            "lora",
            "--missing-eos",
            "none",
            prompts,
        )
    )
    ok(compare(f"sft={tiny_model}", "out", best_of=4))
    report = _report(workdir)
    sft, out = report["policies"]
    assert (sft["label"], out["label"]) == ("sft", "out")
    assert out["kl"]["value"] > 0
    items = [json.loads(line) for line in (workdir / "report" / "items.jsonl").read_text().splitlines()]
    by = {p: [i["reward"] for i in items if i["policy"] == p] for p in ("sft", "out")}
    for item in items:  # the reward is the built-in's formula
        words = len("".join(c if c.isalnum() or c == "'" else " " for c in item["completion"]).split())
        assert item["reward"] <= 0 or words == 5
    gain = np.mean(by["out"]) - np.mean(by["sft"])
    assert out["against_first"]["reward"]["value"] == pytest.approx(gain)
    wins = np.mean([(a > b) + (a == b) / 2 for a, b in zip(by["out"], by["sft"], strict=True)])
    assert out["against_first"]["reward_win_rate"]["value"] == pytest.approx(wins)
    assert [row["n"] for row in report["best_of_n"]] == [1, 2, 4]
    text = (workdir / "report" / "report.md").read_text()
    assert "side by side" in text
    assert "**out**" in text
    assert (workdir / "report" / "frontier.png").stat().st_size > 1000
    lines = (workdir / "report" / "frontier.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 + 3


def test_the_same_call_gives_the_same_bytes(compare: Compare, tiny_model: Path, workdir: Path) -> None:
    for output in ("one", "two"):
        ok(compare(f"a={tiny_model}", f"b={tiny_model}", output=output, best_of=2))
    for path in sorted((workdir / "one").iterdir()):
        if path.name != "artifact.json":
            assert path.read_bytes() == (workdir / "two" / path.name).read_bytes(), path.name


def _row(reward: tuple[float, float], gold: tuple[float, float]) -> dict[str, Any]:
    spans = {"reward": reward, "gold": gold}
    return {"against_first": {k: {"low": v[0], "high": v[1]} for k, v in spans.items()}}


def test_over_optimisation_is_named() -> None:
    assert "over-optimised" in str(over_optimised(_row((0.1, 0.3), (-0.4, -0.1))))
    assert over_optimised(_row((0.1, 0.3), (0.1, 0.2))) == "better by the gold reward"
    assert "no difference" in str(over_optimised(_row((0.1, 0.3), (-0.1, 0.2))))
    assert over_optimised({"label": "sft"}) is None


def test_two_of_one_name_are_refused(compare: Compare, tiny_model: Path) -> None:
    result = compare(tiny_model, tiny_model)
    assert result.code == 2
    assert "name them with NAME=PATH" in result.stderr


def test_another_tokenizer_is_refused(compare: Compare, tiny_model: Path, workdir: Path) -> None:
    other = shutil.copytree(tiny_model, workdir / "other")
    word_tokenizer().save_pretrained(other)
    result = compare(f"a={tiny_model}", f"b={other}")
    assert result.code == 65
    assert "another tokenizer" in result.stderr
    assert not (workdir / "report").exists()
