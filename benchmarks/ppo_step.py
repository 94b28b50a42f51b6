"""PPO updates a second and peak memory, beside TRL 1.12.0's PPOTrainer (its last) and ms-swift's, in one run.

    python -m venv peer && peer/bin/pip install trl==1.12.0 torch transformers peft datasets
    python -m venv swift && swift/bin/pip install ms-swift==4.6.0 torch
    python benchmarks/ppo_step.py --model artifacts/base --prompts prompts.jsonl \\
        --peer-python peer/bin/python --swift-python swift/bin/python

Each task is a process of its own, in turn, with the same model, prompts, response length, batch and epochs;
medians of --repeats. The reward model has the policy's size. The value model starts from the reward model, of
full weights or with an adapter of its own as the policy; ``+head`` tasks have a value head on the policy
instead, which TRL has not. The first update of each is a warm-up, unless it is the only one. ``rollout``,
``scoring`` and ``update`` are seconds of one update; a share is what the phase needs (products; for the
rollout, weights read) over its time and this machine's rate, measured at the start of each run.

Peak is the highest resident size of the process, growth that above the size with all models loaded. CPU s is
the processor time of one update, whose ratio other work on the machine disturbs less. Both compute in
--dtype, by default the one that this machine multiplies fastest. TRL runs with the fastest of TRL_SETTINGS
for it, which one shorter run each chooses (or --best). ms-swift, whose PPO is that of the TRL below 1.0 that
it needs, runs with its defaults and TRL's best rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.ppo import CPU_PHASES, PHASES, TRL_SETTINGS, Memory, peer, rates, swift

TASKS = ("ppo-run:lora", "ppo-run:lora+head", "trl:lora", "ppo-run:full", "ppo-run:full+head", "trl:full")
SWIFT_TASKS = ("swift:lora", "swift:full")
SHARES = ("rollout_bandwidth_share", "scoring_flops_share", "update_flops_share")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="artifacts/base")
    parser.add_argument("--prompts", required=True, help="JSONL with a prompt a line")
    parser.add_argument("--peer-python", help="interpreter of the environment with TRL 1.12.0")
    parser.add_argument("--swift-python", help="interpreter of the environment with ms-swift 4.6.0")
    parser.add_argument("--tasks", nargs="+", help="some of them, as ppo-run:lora+head")
    parser.add_argument("--best", nargs="+", default=[], help="TRL's best settings, as lora=NAME full=NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8, help="of ppo-run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=53)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--out", help="a JSON file for every run; the table is of all runs in it")
    parser.add_argument("--work", help="where the reward model and outputs go")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="defaults", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.task:
        engine, method = args.task.split(":")
        found = {"ppo-run": ours, "trl": peer, "swift": swift}[engine](args, method)
        print(json.dumps({"task": args.task, **found}))
        return
    args.work = os.path.abspath(args.work or tempfile.mkdtemp())
    args.dtype = fastest_dtype(args.dtype)
    args.tasks = args.tasks or [*TASKS, *(SWIFT_TASKS if args.swift_python else ())]
    make_reward_model(args)
    kept = json.loads(Path(args.out).read_text()) if args.out and Path(args.out).is_file() else {}
    runs: list[dict[str, Any]] = kept.get("runs", [])
    best = kept.get("best", {}) | dict(pair.split("=") for pair in args.best)
    for method in ("lora", "full"):
        if f"trl:{method}" in args.tasks and method not in best:
            best[method] = search(args, method)
    for _ in range(args.repeats):
        for task in args.tasks:
            runs.append(measured(args, task, best.get(task.split(":")[1], "defaults")))
            if args.out:
                Path(args.out).write_text(json.dumps({"best": best, "runs": runs}, indent=1) + "\n")
    report(runs, best)


def fastest_dtype(asked: str) -> str:
    """``auto`` → what this machine multiplies fastest, by name."""
    import torch

    from tuneutils.shared.device import dtype_name, resolve_dtype

    return dtype_name(resolve_dtype(asked, torch.device("cpu")))


def report(runs: list[dict[str, Any]], best: dict[str, str]) -> None:
    rows = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        of_task = [run for run in runs if run["task"] == task]
        rows[task] = {
            k: statistics.median(r[k] for r in of_task)
            for k, v in of_task[0].items()
            if isinstance(v, (int, float))
        }
    counts = sorted({sum(run["task"] == task for run in runs) for task in rows})
    print(f"TRL's settings: {best}; medians of {', '.join(map(str, counts))}")
    print(
        "| task | samples/s | samples/CPU s | rollout s | scoring s | update s | CPU s of each "
        "| peak GiB | growth GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for task, row in rows.items():
        phases = []
        for phase, share in zip(PHASES, SHARES, strict=True):
            phases.append(f"{row[phase]:.1f}" + (f" ({row[share]:.0%})" if share in row else ""))
        rates = f"{row['samples_per_s']:.2f} | {row['samples_per_cpu_s']:.2f}"
        peak, growth = (row[k] / 2**30 for k in ("peak_bytes", "growth_bytes"))
        cpu = " + ".join(f"{row[phase]:.0f}" for phase in CPU_PHASES)
        print(f"| {task} | {rates} | {' | '.join(phases)} | {cpu} | {peak:.2f} | {growth:.2f} |")
    for task, row in rows.items():
        for peer_name in ("trl", "swift"):
            other = rows.get(f"{peer_name}:{task.split(':')[1].removesuffix('+head')}")
            if task.startswith("ppo-run") and other:
                keys = ("samples_per_s", "samples_per_cpu_s", "peak_bytes", "growth_bytes")
                speed, cpu, peak, growth = (row[k] / other[k] for k in keys)
                print(
                    f"{task} over {peer_name}: {speed:.2f} times the samples/s, {cpu:.2f} times the "
                    f"samples/CPU s, {peak:.2f} times the peak, {growth:.2f} times the growth"
                )


def search(args: argparse.Namespace, method: str) -> str:
    """TRL's fastest setting, by a shorter run each."""
    found: dict[str, float] = {}
    for name, setting in TRL_SETTINGS.items():
        if setting.get("value") == "lora" and method != "lora":
            continue
        if setting["frozen"] not in ("float32", args.dtype):
            continue
        short = argparse.Namespace(**{**vars(args), "batch_size": 16, "epochs": 2})
        try:
            found[name] = measured(short, f"trl:{method}", name)["samples_per_cpu_s"]
        except subprocess.CalledProcessError as exc:
            print(f"TRL fails with {name}: {exc}", file=sys.stderr)
    return max(found, key=found.__getitem__)


def measured(args: argparse.Namespace, task: str, settings: str) -> dict[str, Any]:
    """Run one task in a process of its own."""
    interpreters = {"trl": args.peer_python, "swift": args.swift_python}
    python = interpreters.get(task.split(":")[0], sys.executable)
    line = [python, __file__, "--task", task, "--settings", settings]
    for name, value in vars(args).items():
        if name not in ("task", "tasks", "settings", "best", "out") and value is not None:
            line += [f"--{name.replace('_', '-')}", str(value)]
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "GOMP_SPINCOUNT": "0"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(line, env={**os.environ, **threads, **quiet}, stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print({"settings": settings, **row}, file=sys.stderr, flush=True)
    return row


def make_reward_model(args: argparse.Namespace) -> None:
    """The model's own trunk with a random head: what it says does not matter here."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = Path(args.work) / "rm"
    AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)


def ours(args: argparse.Namespace, method: str) -> dict[str, float]:
    """The command itself, watched for the memory that training starts from and for CPU time."""
    from tuneutils.tools.ppo_run import ppo, train
    from tuneutils.tools.ppo_run.cli import main as ppo_run
    from tuneutils.tools.ppo_run.reward_model import RewardModel

    memory, clock = Memory(), CpuClock()
    prepare = train.prepare

    def watched(*given: Any, **named: Any) -> Any:
        setting = prepare(*given, **named)
        memory.loaded(setting.actors.policy)
        return setting

    train.prepare = watched
    clock.watch(ppo, "collect", "rollout_cpu_s")
    clock.watch(RewardModel, "__call__", "scoring_cpu_s", within="rollout_cpu_s")
    clock.watch(ppo, "score", "scoring_cpu_s")
    clock.watch(ppo, "improve", "update_cpu_s")
    name, _, head = method.partition("+")
    out = Path(args.work) / f"out-{method}"
    line = ["-q", "-m", args.model, "-r", f"{args.work}/rm", args.prompts, "-o", str(out), "--force"]
    line += ["--method", name, "--dtype", args.dtype, "--device", "cpu", "--updates", str(args.updates)]
    line += ["--batch-size", str(args.batch_size), "--micro-batch-size", str(args.micro_batch_size)]
    line += ["--ppo-epochs", str(args.epochs), "--max-new-tokens", str(args.response_length)]
    line += ["--value", "policy" if head else "reward", "--checkpoint-every", "0", "--samples-every", "0"]
    try:
        ppo_run(line)
    except SystemExit as done:
        if done.code:
            raise
    log = Path(args.work) / ".work" / out.name / "run.jsonl"
    events = [json.loads(text) for text in log.read_text().splitlines()]
    timed = [e for e in events if e["event"] == "update"][min(1, args.updates - 1) - args.updates :]
    means = {k: statistics.mean(e[k] for e in timed) for k in (*PHASES, *SHARES)}
    means |= clock.means(len(timed))
    cpu_s = sum(means[k] for k in CPU_PHASES)
    return {**rates(args, sum(means[k] for k in PHASES), cpu_s), **means, **memory.found()}


class CpuClock:
    """Processor time of the calls of some functions, each update's last ones counted."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {name: [] for name in CPU_PHASES}

    def watch(self, where: Any, function: str, phase: str, within: str | None = None) -> None:
        """From here on; calls inside those of the phase ``within`` are taken from it."""
        inner = getattr(where, function)

        def call(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            made = inner(*given, **named)
            taken = time.process_time() - start
            self.spent[phase].append(taken)
            if within is not None:
                self.spent[within].append(-taken)
            return made

        setattr(where, function, call)

    def means(self, updates: int) -> dict[str, float]:
        """Of the last ``updates``; a phase has as many calls in each."""
        total = len(self.spent["update_cpu_s"])
        made = {}
        for phase, taken in self.spent.items():
            calls = len(taken) // total * updates
            made[phase] = sum(taken[-calls:]) / updates
        return made


if __name__ == "__main__":
    main()
