"""A process that has imported everything once and forks for each run: real processes, without their start.

Reads jobs as JSON lines on stdin and answers each with one line: for every process of the job its exit code
(minus the signal's number where one ended it). Keys of a process:

- ``args``, ``cwd``, ``env``, ``stdout``, ``stderr``: as they say; the streams are files.
- ``kill_at``: SIGKILL before the N-th write to the file system from Python (open for writing, rename, mkdir, …).
- ``writes``: the file into which the number of those writes goes at a regular end.
- ``kill_after``: SIGKILL after so many seconds.
- ``memory``: bytes of address space it may have beyond what it has at the start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
import bitsandbytes  # noqa: F401 - the imports are the point of this process
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import trl  # noqa: F401

import tuneutils.shared.training
import tuneutils.tools.lora_tune.tune
from tuneutils.tools.lora_tune.cli import main

WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Writes:
    """Counts this process's writes to the file system, and ends it before the ``kill_at``-th."""

    def __init__(self, kill_at: int | None) -> None:
        self.count = 0
        self.kill_at = kill_at
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in WRITES:
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def child(process: dict[str, Any]) -> None:
    os.chdir(process["cwd"])
    os.environ.update(process.get("env", {}))
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(process[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m) for n, m in ((0, "r"), (1, "w"), (2, "w")))
    if process.get("memory"):
        import resource

        with open("/proc/self/statm", encoding="ascii") as stream:
            used = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + process["memory"],) * 2)
    if process.get("kill_after"):
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, process["kill_after"])
    writes = Writes(process.get("kill_at"))
    code = 1
    try:
        main(process["args"])
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if process.get("writes"):
            count = writes.count
            with open(process["writes"], "w", encoding="ascii") as stream:
                stream.write(str(count))
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        pids = []
        for process in json.loads(line):
            pid = os.fork()
            if pid == 0:
                child(process)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


if __name__ == "__main__":
    assert tuneutils.shared.training
    assert tuneutils.tools.lora_tune.tune
    serve()
