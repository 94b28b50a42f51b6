"""A student taught by its teacher beside the same student trained alone: same tokens, steps and seed.

    python benchmarks/distill.py --model artifacts/base --out distill.json
    python benchmarks/distill.py --seeds 0 1 2 --layers 20 --steps 60

Each seed trains two students of the same layers by the distill command: with --loss ce, then with the
teacher's distributions and the first as its --baseline. Printed are the held-out differences with intervals
of paired resamples over records, for each seed, then their mean and range over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METRICS = ("nll", "kl", "agreement", "accuracy", "calibration_error", "win_rate")


def command(*args: Any) -> float:
    """Run one of our tools; seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", *map(str, args)], check=True)
    return time.monotonic() - started


def data(folder: Path) -> tuple[Path, Path]:
    """The built-in web texts in two parts."""
    where = folder / "c4"
    command(
        "tuneutils.tools.data_import.cli",
        "builtin:c4-demo",
        "--split",
        "train=0.8,heldout=0.2",
        "-q",
        "-o",
        where,
    )
    return where / "train.jsonl", where / "heldout.jsonl"


def run(args: argparse.Namespace, folder: Path, train: Path, heldout: Path, seed: int) -> dict[str, Any]:
    common = ["tuneutils.tools.distill.cli", "-m", args.model, train, "--seed", seed, "-q", "--no-speed"]
    common += ["--student-layers", args.layers, "--max-steps", args.steps, "--batch-size", args.batch_size]
    common += ["--learning-rate", args.learning_rate, "--checkpoint-every", 0, *args.extra]
    alone, taught = folder / f"alone-{seed}", folder / f"taught-{seed}"
    times = {"alone_s": command(*common, "--loss", "ce", "-o", alone)}
    times["taught_s"] = command(*common, *args.teach, "--heldout", heldout, "--baseline", alone, "-o", taught)
    report = json.loads((taught / "report.json").read_text(encoding="utf-8"))
    if not all(report["baseline"].values()):
        raise SystemExit(f"the two runs differ in more than the loss: {report['baseline']}")
    return {"seed": seed, **times, "heldout": report["heldout"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="artifacts/base")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--teach", nargs="*", default=["--hidden-weight=1"], help="options of the taught alone"
    )
    parser.add_argument("--extra", nargs="*", default=[], help="more options of distill, for both")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train, heldout = data(Path(temporary))
        runs = [run(args, Path(temporary), train, heldout, seed) for seed in args.seeds]
    print("| seed | metric | alone | taught | taught less alone, 95 % |")
    print("|---|---|---|---|---|")
    for made in runs:
        held = made["heldout"]
        for metric in METRICS:
            value = held["against_baseline"][metric]
            shown = f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            models = [
                held["models"][which].get("perplexity" if metric == "nll" else metric, {}).get("value")
                for which in ("baseline", "student")
            ]
            cells = " | ".join("" if v is None else f"{v:.3f}" for v in models)
            print(f"| {made['seed']} | {metric} | {cells} | {shown} |")
    for metric in METRICS:
        values = [made["heldout"]["against_baseline"][metric]["value"] for made in runs]
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{metric}: mean {statistics.fmean(values):.3f} over {len(values)} seeds, {spread}")
    if args.out:
        args.out.write_text(json.dumps({"args": vars(args), "runs": runs}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
