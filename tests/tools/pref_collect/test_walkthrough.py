"""From a person's clicks to a better model, as the front page tells it: every step is the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import invoke, load_tool, tiny_records, write_jsonl

from tuneutils.shared.manifest import lineage

CPU = ("--device", "cpu", "--dtype", "float32")


def call(tool: str, *args: Any) -> None:
    done = invoke(load_tool(tool), *map(str, args))
    assert done.code == 0, done.stderr


def click_the_longer(page: Any) -> None:
    """A person who always finds the longer answer much better, with the mouse."""
    lengths = [len(page.locator(f".side-{i} .text").text_content().strip()) for i in (1, 2)]
    side = "A" if lengths[0] >= lengths[1] else "B"
    page.get_by_role("radio", name=f"{side} much better").click()
    page.get_by_role("button", name="Save").click()


def test_twenty_clicks_become_a_policy(
    chromium: Any, serve: Callable[..., Any], tiny_model: Path, workdir: Path
) -> None:
    write_jsonl(workdir / "prompts.jsonl", tiny_records("prompt", 20))
    sampled = ("--max-new-tokens", 12, "--temperature", 1.0, *CPU)
    call("pref-collect", "generate", "-m", tiny_model, "prompts.jsonl", *sampled, "-o", "candidates.jsonl")
    candidates = [json.loads(line) for line in (workdir / "candidates.jsonl").read_text().splitlines()]
    served = serve(candidates)
    page = chromium.new_page()
    page.goto(f"{served.url}/login#{served.tokens['rater-0']}")
    for i in range(len(candidates)):
        page.get_by_text(f"{i} of {len(candidates)} answered").wait_for()
        click_the_longer(page)
    page.get_by_text("All done").wait_for()
    served.stop()

    call("pref-collect", "export", "study.db", "-o", "preferences.jsonl")
    preferences = [json.loads(line) for line in (workdir / "preferences.jsonl").read_text().splitlines()]
    assert len(preferences) == len(candidates)
    assert all(len(p["chosen"].strip()) >= len(p["rejected"].strip()) for p in preferences)

    call("rm-train", "preferences.jsonl", "-m", tiny_model, "--epochs", 2, *CPU, "-o", "reward-model")
    small = ("--updates", 2, "--batch-size", 8, "--max-new-tokens", 12, *CPU)
    call("ppo-run", "-m", tiny_model, "-r", "reward-model", "prompts.jsonl", *small, "-o", "ppo")
    asked = ("--prompts", "prompts.jsonl", "-r", "reward-model", "--max-new-tokens", 12, *CPU)
    call("ppo-run", "compare", f"sft={tiny_model}", "ppo", *asked, "-o", "report")
    assert "**ppo**" in (workdir / "report" / "report.md").read_text()
    sources = {found.path for _, found, _ in lineage(Path("report"))}
    assert {"ppo", "reward-model", "preferences.jsonl", "study.db"} <= sources
