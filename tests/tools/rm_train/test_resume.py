"""A run killed at any moment and started again gives the bytes of the run that was not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support import Result, forked, invoke, load_tool, run_cli

from .conftest import CPU, QUICK, contents

SIGKILL = -9


def run(model: Path, method: str) -> Result:
    args = ("records.jsonl", "-m", model, "-o", "out", "--method", method, *QUICK, *CPU)
    every = ("--checkpoint-every", "2", "--gradient-accumulation", "2", "--epochs", "2")
    return invoke(load_tool("rm-train"), *map(str, args), *every)


def clean(folder: Path) -> None:
    for name in ("out", ".work"):
        shutil.rmtree(folder / name, ignore_errors=True)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_same_bytes(
    method: str, tiny_model: Path, records: Path, workdir: Path
) -> None:
    code, writes = forked(lambda: run(tiny_model, method))
    assert code == 0
    expected = contents(workdir / "out")

    clean(workdir)
    chooser = random.Random(method)
    checkpoints = [
        chooser.randrange(writes // 3, 2 * writes // 3),
        chooser.randrange(writes // 4, writes // 2),
    ]
    for moment in checkpoints:  # the second one goes on from the first
        code, _ = forked(lambda: run(tiny_model, method), kill_at=moment)
        assert code == SIGKILL
        assert not (workdir / "out").exists()
    resumed = run(tiny_model, method)
    assert resumed.code == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    assert contents(workdir / "out") == expected


@pytest.mark.slow
def test_two_processes_do_what_one_does(tiny_model: Path, records: Path, workdir: Path) -> None:
    common = ("records.jsonl", "-m", str(tiny_model), "--learning-rate", "0.005", "--epochs", "2", *CPU, "-q")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617")
    module = ("-m", "tuneutils.tools.rm_train.cli")
    one = run_cli(*module, *common, "-o", "one", "--batch-size", "6", cwd=workdir)
    two = run_cli(*launch, *module, *common, "-o", "two", "--batch-size", "3", cwd=workdir)
    assert (one.code, two.code) == (0, 0), two.stderr
    logs = [
        [json.loads(line) for line in (workdir / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in logs[0]] == pytest.approx([e[key] for e in logs[1]], rel=1e-4)
