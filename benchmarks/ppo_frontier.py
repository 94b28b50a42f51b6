"""Reward against KL on the real model with a reward that can be computed exactly, beside best-of-n.

    python benchmarks/ppo_frontier.py --model artifacts/rlhf/sft \\
        --prompts artifacts/rlhf/preferences/reward.jsonl --heldout artifacts/rlhf/preferences/heldout.jsonl

PPO is run once for each coefficient of the KL penalty; ``ppo-run compare`` then measures all policies on the
held-out prompts with the first policy's best-of-n. The optimum of each coefficient, π ∝ π_ref·exp(r/β), has
the highest reward that its KL allows, so it lies on or above best-of-n; a run that has not converged, or a
policy that cannot represent it, may lie below. The last column says how far each policy lies above
best-of-n at its own KL, interpolated in KL; beyond the largest n it is compared with that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="the SFT model")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--reward", default="builtin:length:8")
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.3, 0.1, 0.03])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--limit", type=int, default=160, help="held-out prompts")
    parser.add_argument("--best-of", type=int, default=16)
    parser.add_argument("--work", help="where policies and the report go")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    work = Path(args.work or tempfile.mkdtemp())
    sampled = ["--max-new-tokens", "32", "--temperature", "1.0", "--dtype", "bfloat16"]
    policies = []
    for kl_coef in args.kl_coefs:
        output = work / f"kl-{kl_coef:g}"
        policies.append(f"beta-{kl_coef:g}={output}")
        start = ("-m", args.model, "-r", args.reward, args.prompts, *sampled)
        call("ppo-run", "train", *start, *recipe(args, kl_coef), "-o", output)
    asked = ("--prompts", args.heldout, "-r", args.reward, "--limit", args.limit, "--best-of", args.best_of)
    call("ppo-run", "compare", f"sft={args.model}", *policies, *asked, *sampled, "-o", work / "report")
    show(json.loads((work / "report" / "report.json").read_text(encoding="utf-8")))


def recipe(args: argparse.Namespace, kl_coef: float) -> list[str]:
    options = {
        "kl-coef": kl_coef,
        "updates": args.updates,
        "learning-rate": args.learning_rate,
        "batch-size": 64,
        "minibatches": 2,
        "ppo-epochs": 2,
        "micro-batch-size": 16,
        "rollout-batch-size": 64,
        "missing-eos": "none",
        "checkpoint-every": 0,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def call(*line: Any) -> None:
    subprocess.run([str(word) for word in line], check=True)


def show(report: dict[str, Any]) -> None:
    """The table, and each policy's distance from best-of-n at its KL."""
    curve = report["best_of_n"]
    print(f"{report['prompts']} prompts\n\n| policy | KL | reward | above best-of-n |\n|---|---|---|---|")
    for row in curve:
        print(f"| best of {row['n']} | {row['kl']:.3f} | {spread(row['reward'])} | |")
    known = [r["kl"] for r in curve], [r["reward"]["value"] for r in curve]
    for row in report["policies"][1:]:
        above = row["reward"]["value"] - np.interp(row["kl"]["value"], *known)
        print(f"| {row['label']} | {spread(row['kl'])} | {spread(row['reward'])} | {above:+.3f} |")


def spread(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    main()
