"""A run killed at any moment and started again gives the bytes of the run that was not."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from support import Result, run_cli

from .conftest import CPU, QUICK, contents

SCRIPT = Path(__file__).with_name("killed.py")
SIGKILL = -9


def run(folder: Path, model: Path, method: str, kill_at: int = 0) -> Result:
    args = ("records.jsonl", "-m", model, "-o", "out", "--method", method, *QUICK, *CPU)
    every = ("--checkpoint-every", "2", "--gradient-accumulation", "2", "--epochs", "2")
    return run_cli(SCRIPT, "writes", str(kill_at), *map(str, args), *every, cwd=folder)


def clean(folder: Path) -> None:
    for name in ("out", ".work"):
        shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(
    method: str, tiny_model: Path, records: Path, workdir: Path
) -> None:
    done = run(workdir, tiny_model, method)
    assert done.code == 0, done.stderr
    writes = int((workdir / "writes").read_text())
    expected = contents(workdir / "out")

    clean(workdir)
    chooser = random.Random(method)
    checkpoints = [
        chooser.randrange(writes // 3, 2 * writes // 3),
        chooser.randrange(writes // 4, writes // 2),
    ]
    for moment in checkpoints:  # the second one goes on from the first
        killed = run(workdir, tiny_model, method, moment)
        assert killed.code == SIGKILL, killed.stderr
        assert not (workdir / "out").exists()
    resumed = run(workdir, tiny_model, method)
    assert resumed.code == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    assert contents(workdir / "out") == expected
