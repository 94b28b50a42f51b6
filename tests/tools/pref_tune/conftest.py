"""``pt``: pref-tune in this process on the tiny model, in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result, invoke, load_tool, write_jsonl

CPU = ("--device", "cpu", "--dtype", "float32")
QUICK = ("--batch-size", "4", "--learning-rate", "0.005", "--heldout-share", "0.3")
FAST = ("--answers", "3", "--max-new-tokens", "4")


def preferences(count: int = 40, start: int = 0) -> list[dict[str, Any]]:
    """Proverbs are preferred to refusals; lengths differ widely."""
    made = []
    for i in range(start, start + count):
        words = PROVERBS[i % len(PROVERBS)].split()
        answer = " ".join(words[: 2 + (i * 5) % len(words)])
        made.append({"prompt": f"Say {i}." + " Go on." * (i % 4), "chosen": answer, "rejected": f"No, {i}."})
    return made


def labelled(count: int = 40) -> list[dict[str, Any]]:
    """The same as answers with a label, two of three of them good."""
    return [
        {"prompt": r["prompt"], "completion": r["chosen"] if i % 3 else r["rejected"], "label": bool(i % 3)}
        for i, r in enumerate(preferences(count))
    ]


@pytest.fixture
def records(workdir: Path) -> Path:
    return write_jsonl(workdir / "records.jsonl", preferences())


@pytest.fixture
def pt(workdir: Path, tiny_model: Path) -> Callable[..., Result]:
    """``pt(records, "--loss", "ipo", output="out")``: pref-tune train."""
    command = load_tool("pref-tune")

    def call(*args: Any, output: str = "out", model: Path | str = tiny_model, **keywords: Any) -> Result:
        given = [str(a) for a in args]
        quick = () if "--dry-run" in given else FAST
        return invoke(command, *given, "-m", str(model), "-o", output, *CPU, *quick, **keywords)

    return call


def report_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return loaded


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
