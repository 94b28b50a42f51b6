"""CPU seconds of ``--help``: every tool of tuneutils, and ``trl sft --help`` beside them.

    python benchmarks/help_time.py
    python benchmarks/help_time.py --out help_time.json

Each command runs in a process of its own, all commands in turn; user and system time of the process and its
children are counted, and medians printed. The installed commands are measured, as a user starts them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a command that must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", default="trl sft", help="the command to compare with")
    parser.add_argument("--out", help="a JSON file for the result")
    args = parser.parse_args()

    folder = Path(sys.executable).parent
    tools = sorted({e.name for e in entry_points(group="tuneutils.tools")})
    commands = {name: [str(folder / name), "--help"] for name in ["tuneutils", *tools]}
    peer, *rest = args.peer.split()
    commands[args.peer] = [str(folder / peer), *rest, "--help"]
    commands = {name: command for name, command in commands.items() if Path(command[0]).exists()}
    if args.peer not in commands or len(commands) < 2:
        sys.exit("install tuneutils and the peer into this environment first: pip install -e '.[train]'")
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    slowest = max((n for n in commands if n != args.peer), key=medians.__getitem__)
    print(f"{len(os.sched_getaffinity(0))} cores; medians of {args.repeats}, CPU milliseconds")
    for name, seconds in medians.items():
        print(f"{name:20} {1000 * seconds:8.0f}")
    ratio = medians[args.peer] / medians[slowest]
    print(f"slowest: {slowest}, {1000 * medians[slowest]:.0f} ms; {args.peer} takes {ratio:.0f} times that")
    if args.out:
        row = {"medians_s": medians, "slowest": slowest, "ratio": ratio, "repeats": args.repeats}
        Path(args.out).write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
