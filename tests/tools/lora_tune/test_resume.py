"""A run killed at any moment and started again gives the bytes of the run that was not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, run_cli, tool_args

from .conftest import Forks, contents

SIGKILL = -9
METHODS = {
    "lora": ["--lora-dropout", "0.2"],
    "full": [],
    "houlsby": ["--peft-option", "dropout=0.2"],
    "prefix": ["--virtual-tokens", "3"],
    "p-tuning": ["--virtual-tokens", "3"],
    "pissa": ["--method", "lora", "--pissa", "--lora-dropout", "0.2", "--lora-rank", "4"],
}


def arguments(method: str, model: Path, records: Path, heldout: Path) -> list[str]:
    chosen = [] if method == "pissa" else ["--method", method]
    common = (
        "-o out --dtype float32 --batch-size 2 --gradient-accumulation 2 --max-steps 7 --checkpoint-every 2"
    )
    evaluated = ["--heldout", heldout.name, "--eval-every", "3"]
    return [records.name, "-m", str(model), *chosen, *METHODS[method], *common.split(), *evaluated]


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_in_the_same_bytes(
    method: str, forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    args = arguments(method, tiny_model, records, heldout)
    (done,) = forks(*args, cwd=workdir)
    assert done.code == 0, done.stderr
    writes = int((workdir / ".writes.0").read_text())
    expected = contents(workdir / "out")

    chooser = random.Random(method)
    clean(workdir)
    for moment in sorted(chooser.sample(range(2, writes), 2)):  # the second one goes on from the first
        (killed,) = forks(*args, cwd=workdir, kill_at=moment)
        assert killed.code in (SIGKILL, 0), killed.stderr
        assert killed.code == 0 or not (workdir / "out").exists() or contents(workdir / "out") == expected
    (resumed,) = forks(*args, cwd=workdir)
    assert resumed.code == 0, resumed.stderr
    assert contents(workdir / "out") == expected


@pytest.mark.parametrize("stops_early", [False, True])
def test_a_run_killed_after_its_last_step_takes_no_further_one(
    stops_early: bool, forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    args = arguments("lora", tiny_model, records, heldout)
    if stops_early:  # so high a rate that the held-out loss soon rises
        args += ["--learning-rate", "0.3", "--patience", "1", "--eval-every", "1", "--schedule", "constant"]
    (done,) = forks(*args, cwd=workdir)
    assert done.code == 0, done.stderr
    expected = contents(workdir / "out")
    writes = int((workdir / ".writes.0").read_text())
    assert (json.loads(expected["artifact.json"])["metrics"]["steps"] < 7) == stops_early
    clean(workdir)
    (killed,) = forks(*args, cwd=workdir, kill_at=writes - 3)
    assert killed.code == SIGKILL
    assert not (workdir / "out").exists()
    (resumed,) = forks(*args, cwd=workdir)
    assert resumed.code == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    assert contents(workdir / "out") == expected


def test_early_stopping_goes_on_counting(
    forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    args = arguments("lora", tiny_model, records, heldout)
    args += ["--learning-rate", "0.3", "--patience", "2", "--eval-every", "1", "--schedule", "constant"]
    args += ["--max-steps", "12"]
    forks(*args, cwd=workdir)
    expected = contents(workdir / "out")
    assert json.loads(expected["artifact.json"])["metrics"]["steps"] < 12
    writes = int((workdir / ".writes.0").read_text())
    for share in (0.4, 0.6, 0.8):
        clean(workdir)
        (killed,) = forks(*args, cwd=workdir, kill_at=int(share * writes))
        assert killed.code == SIGKILL
        (resumed,) = forks(*args, cwd=workdir)
        assert resumed.code == 0, resumed.stderr
        assert contents(workdir / "out") == expected


@pytest.mark.slow
def test_a_kill_at_any_write(
    forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    """Half a checkpoint is ignored, whichever half; so is half an artifact."""
    args = arguments("lora", tiny_model, records, heldout)
    forks(*args, cwd=workdir)
    expected = contents(workdir / "out")
    writes = int((workdir / ".writes.0").read_text())
    for moment in range(2, writes + 1):
        clean(workdir)
        (killed,) = forks(*args, cwd=workdir, kill_at=moment)
        assert killed.code == SIGKILL
        (resumed,) = forks(*args, cwd=workdir)
        assert resumed.code == 0, resumed.stderr
        assert contents(workdir / "out") == expected


def test_two_runs_and_any_hash_seed_give_the_same_bytes(
    forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    args = arguments("lora", tiny_model, records, heldout)
    forks(*args, cwd=workdir)  # in a process whose hash seed is random
    expected = contents(workdir / "out")
    clean(workdir)
    done = run_cli(*tool_args("lora-tune"), *args, cwd=workdir, env={"PYTHONHASHSEED": "1"})
    assert done.code == 0, done.stderr
    assert contents(workdir / "out") == expected


def test_a_finished_run_is_left_alone(tune: Callable[..., Result], records: Path, workdir: Path) -> None:
    assert tune(records, "--max-steps", "1").code == 0
    before = contents(workdir / "out"), (workdir / "out" / "artifact.json").stat().st_mtime_ns
    again = tune(records, "--max-steps", "1", "--json")
    assert again.code == 0
    assert again.json()["up_to_date"] is True
    assert before == (contents(workdir / "out"), (workdir / "out" / "artifact.json").stat().st_mtime_ns)
    assert tune(records, "--max-steps", "2").code == 73
    assert tune(records, "--max-steps", "2", "--force").code == 0


def test_a_checkpoint_of_other_settings_is_not_resumed(
    forks: Forks, tiny_model: Path, records: Path, heldout: Path, workdir: Path
) -> None:
    args = arguments("lora", tiny_model, records, heldout)
    other = [*args, "--learning-rate", "0.01"]
    (done,) = forks(*other, cwd=workdir)
    expected = contents(workdir / "out")
    clean(workdir)
    (killed,) = forks(*args, cwd=workdir, kill_at=int((workdir / ".writes.0").read_text()) - 3)
    assert killed.code == SIGKILL
    assert list((workdir / ".work/out/checkpoints").glob("checkpoint-*"))
    (done,) = forks(*other, cwd=workdir)
    assert "going on" not in done.stderr
    assert contents(workdir / "out") == expected


def clean(workdir: Path) -> None:
    shutil.rmtree(workdir / "out", ignore_errors=True)
    shutil.rmtree(workdir / ".work", ignore_errors=True)
