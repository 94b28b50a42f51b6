"""How much of the perplexity that rounding to 4 bits lost quantization-aware training wins back.

    python benchmarks/rescaled.py artifacts/base -o artifacts/rescaled
    python benchmarks/qat_recovery.py artifacts/rescaled --train TRAIN.jsonl --heldout HELD.jsonl

Each seed is a run of the command, which judges float, rounded (to nearest, the same grid) and trained on the
same held-out records, with 95 % bootstrap intervals over records. What follows ``--options`` is of qat-tune.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """One run's report."""
    out = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "tuneutils.tools.qat_tune.cli", "-m", args.model, args.train]
    command += ["--heldout", args.heldout, "--max-steps", str(args.steps), "--checkpoint-every", "0"]
    command += ["--seed", str(seed), "-q", "-o", str(out), *args.options]
    subprocess.run(command, check=True)
    return dict(json.loads((out / "report.json").read_text(encoding="utf-8")))


def shown(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=["--learning-rate", "2e-4"], help="of qat-tune; last"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reports = {seed: run(args, seed, Path(folder)) for seed in args.seeds}
    print("| seed | records | float | rounded | trained | perplexity recovered | KL recovered |")
    print("|---|---|---|---|---|---|---|")
    for seed, made in reports.items():
        columns = [shown(made["models"][name]["perplexity"]) for name in ("float", "rounded", "trained")]
        shares = [shown(made["recovered"][name]) for name in ("perplexity", "kl")]
        print(f"| {seed} | {made['records']} | {' | '.join([*columns, *shares])} |")
    if args.out:
        args.out.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    half = all((made["recovered"]["perplexity"] or {"low": 0})["low"] >= 0.5 for made in reports.values())
    print(f"at least half recovered, by the interval's lower end, for every seed: {half}")
    return 0 if half else 1


if __name__ == "__main__":
    sys.exit(main())
