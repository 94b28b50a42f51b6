"""A run that is stopped and started again gives the bytes of the run that was not."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import Result, forked

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
    qat: Callable[..., Result], texts: Path, workdir: Path
) -> None:
    code, writes = forked(lambda: qat(texts, *COMMON))
    assert code == 0
    expected = contents("out")
    shutil.rmtree("out")
    shutil.rmtree(".work")
    code, _ = forked(lambda: qat(texts, *COMMON), kill_at=writes // 2)
    assert code == -signal.SIGKILL
    assert not Path("out").exists()
    resumed = qat(texts, *COMMON)
    assert "going on from step" in resumed.stderr
    assert contents("out") == expected
