"""A run's log is one JSON object an update, which trackers take as it is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import ROOT, Result

from .conftest import log_of


def test_the_example_of_the_readme_logs_every_number(
    ppo: Callable[..., Result], prompts: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ``Live`` is a stand-in that keeps what DVCLive's interface is given."""
    done = ppo(prompts, "-r", "builtin:length", output="ppo")
    assert done.code == 0, done.stderr
    kept: list[dict[str, float]] = [{}]

    class Live:
        def __enter__(self) -> Live:
            return self

        def __exit__(self, *_: object) -> None: ...

        def log_metric(self, name: str, value: float) -> None:
            kept[-1][name] = value

        def next_step(self) -> None:
            kept.append({})

    module: Any = ModuleType("dvclive")
    module.Live = Live
    monkeypatch.setitem(sys.modules, "dvclive", module)
    readme = (ROOT / "tools/ppo_run/README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "dvclive" in block)
    exec(compile(example, "README.md", "exec"), {})
    wanted = [
        {k: v for k, v in line.items() if isinstance(v, (int, float))} for line in log_of(workdir / "ppo")
    ]
    assert kept == [*wanted, {}]
    assert {"reward", "kl", "entropy", "length", "clip_fraction", "explained_variance"} <= kept[0].keys()
