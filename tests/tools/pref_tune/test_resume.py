"""A run killed at any moment and started again gives the bytes of the run that was not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support import Result, forked, invoke, load_tool, run_cli, write_jsonl

from .conftest import CPU, FAST, QUICK, contents, labelled

SIGKILL = -9
CASES = [
    ("dpo", "lora"),
    pytest.param("dpo", "full", marks=pytest.mark.slow),
    pytest.param("kto", "lora", marks=pytest.mark.slow),
]


def run(model: Path, loss: str, method: str) -> Result:
    args = ("records.jsonl", "-m", model, "-o", "out", "--loss", loss, "--method", method, *QUICK, *CPU)
    every = ("--checkpoint-every", "2", "--gradient-accumulation", "2", "--epochs", "2", *FAST)
    return invoke(load_tool("pref-tune"), *map(str, args), *every)


@pytest.mark.parametrize(("loss", "method"), CASES)
def test_killed_runs_end_in_the_same_bytes(
    loss: str, method: str, tiny_model: Path, records: Path, workdir: Path
) -> None:
    if loss == "kto":
        write_jsonl(records, labelled())
    code, writes = forked(lambda: run(tiny_model, loss, method))
    assert code == 0
    expected = contents(workdir / "out")

    for name in ("out", ".work"):
        shutil.rmtree(workdir / name, ignore_errors=True)
    chooser = random.Random(loss + method)
    moments = [chooser.randrange(writes // 3, 2 * writes // 3), chooser.randrange(writes // 4, writes // 2)]
    for moment in moments:  # the second one goes on from the first
        code, _ = forked(lambda: run(tiny_model, loss, method), kill_at=moment)
        assert code == SIGKILL
        assert not (workdir / "out").exists()
    resumed = run(tiny_model, loss, method)
    assert resumed.code == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    assert contents(workdir / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_two_processes_do_what_one_does(loss: str, tiny_model: Path, records: Path, workdir: Path) -> None:
    if loss == "kto":
        write_jsonl(records, labelled())
    common = ("records.jsonl", "-m", str(tiny_model), "--loss", loss, "--learning-rate", "0.005", *CPU, "-q")
    common += ("--epochs", "2", "--answers", "0")
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619")
    module = ("-m", "tuneutils.tools.pref_tune.cli")
    one = run_cli(*module, *common, "-o", "one", "--batch-size", "6", cwd=workdir)
    two = run_cli(*launch, *module, *common, "-o", "two", "--batch-size", "3", cwd=workdir)
    assert (one.code, two.code) == (0, 0), two.stderr
    logs = [
        [json.loads(line) for line in (workdir / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for key in ("loss", "grad_norm"):
        assert [e[key] for e in logs[0]] == pytest.approx([e[key] for e in logs[1]], rel=1e-4)
