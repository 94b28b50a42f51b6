"""A run that is stopped and started again gives the bytes of the run that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import Result, environment, tool_args

from tuneutils.shared.errors import ExitCode
from tuneutils.shared.training import MarkComplete

from .conftest import contents

COMMON = ("--epochs", 3, "--batch-size", 2, "--gradient-accumulation", 2, "--checkpoint-every", 2)


@pytest.mark.parametrize(
    "args",
    [(), ("--learn-scales", "--loss", "ce"), ("--method", "lora", "--learn-scales", "--symmetric")],
    ids=" ".join,
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    args: Sequence[str],
    qat: Callable[..., Result],
    texts: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    common = (texts, *COMMON, *args, "--heldout", texts)
    assert qat(*common, output="whole").code == 0
    original = MarkComplete.on_save

    def stop_at_four(self: Any, args: Any, state: Any, *rest: Any, **kw: Any) -> None:
        original(self, args, state, *rest, **kw)
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(MarkComplete, "on_save", stop_at_four)
    assert qat(*common).code == ExitCode.INTERRUPTED
    assert not (workdir / "out").exists()
    monkeypatch.setattr(MarkComplete, "on_save", original)
    resumed = qat(*common)
    assert "going on from step 4" in resumed.stderr
    assert contents("out") == contents("whole")


def test_a_killed_process_ends_in_the_same_bytes(
    qat: Callable[..., Result], texts: Path, model: Path, workdir: Path
) -> None:
    args = (texts.name, *COMMON, "--group-size", 16, "--dtype", "float32", "-m", model, "-o", "out")
    assert qat(texts, *COMMON, output="out").code == 0
    expected = contents("out")
    shutil.rmtree("out")
    shutil.rmtree(".work")
    command = [sys.executable, *tool_args("qat-tune"), *map(str, args)]
    process = subprocess.Popen(command, cwd=workdir, env=environment(), stderr=subprocess.DEVNULL)
    checkpoints = workdir / ".work" / "out" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/complete")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert subprocess.run(command, cwd=workdir, env=environment(), check=False).returncode == 0
    resumed = contents("out")
    for made in (resumed, expected):
        made.pop("artifact.json")  # names the paths as they were given
    assert resumed == expected
