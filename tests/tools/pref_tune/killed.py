"""``python killed.py COUNTS KILL_AT ARGS…``: pref-tune that dies by SIGKILL before its N-th write, 0 for never.

Writes are counted from Python: opening a file for writing, renaming, making and removing folders. At a
regular end their number goes to the file COUNTS.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def main() -> None:
    counts, kill_at, *args = sys.argv[1:]
    from tuneutils.tools.pref_tune.cli import main as command

    count = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            flags = details[2] if isinstance(details[2], int) else 0
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in WRITES:
            return
        count += 1
        if count == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        command(args)
    finally:
        done = str(count)
        with open(counts, "w", encoding="ascii") as stream:
            stream.write(done)


if __name__ == "__main__":
    main()
