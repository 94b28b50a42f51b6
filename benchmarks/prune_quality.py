"""Which way of pruning loses how much: perplexity, KL and top-1 agreement with the original, with intervals.

    python benchmarks/prune_quality.py artifacts/rescaled --calibration CAL.jsonl --heldout HELD.jsonl

Each way is run as the command that a user would give, loaded with Transformers, and scored on the same
windows of held-out text. For the ways that cut structures out, the speed beside the original, in the same
run, as prune logs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from heldout import Heldout, last_line, table

WAYS: dict[str, tuple[str, ...]] = {
    "magnitude-50": ("--method", "magnitude", "--no-speed"),
    "wanda-50": ("--method", "wanda", "--no-speed"),
    "sparsegpt-50": ("--method", "sparsegpt", "--no-speed"),
    "magnitude-2:4": ("--method", "magnitude", "--pattern", "2:4", "--no-speed"),
    "wanda-2:4": ("--method", "wanda", "--pattern", "2:4", "--no-speed"),
    "sparsegpt-2:4": ("--method", "sparsegpt", "--pattern", "2:4", "--no-speed"),
    "layers-10": ("--method", "layers", "--sparsity", "0.1"),
    "layers-50": ("--method", "layers", "--sparsity", "0.5"),
    "mlp-50": ("--method", "mlp", "--sparsity", "0.5"),
}
#: The first of each pair should have the lower perplexity and KL.
ORDERINGS = [
    ("wanda-50", "magnitude-50"),
    ("sparsegpt-50", "wanda-50"),
    ("magnitude-50", "magnitude-2:4"),
    ("wanda-50", "wanda-2:4"),
    ("sparsegpt-50", "sparsegpt-2:4"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration row")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--way", action="append", choices=WAYS, help="only these")
    parser.add_argument("--keep", type=Path, help="folder of scores: a run that was cut off goes on there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    heldout = Heldout(
        args.model, args.heldout, windows=args.windows, length=args.window, dtype=args.dtype, keep=args.keep
    )
    for name in args.way or WAYS:
        if name in heldout.rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known = pruned(args, WAYS[name], Path(folder))
            row = heldout.add(name, Path(folder) / "out", **known)
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    orderings = heldout.orderings(ORDERINGS)
    print(table(heldout.rows, orderings, ("parameters", "prefill", "decode", "seconds")))
    if args.out:
        args.out.write_text(json.dumps({"rows": heldout.rows, "orderings": orderings}, indent=2) + "\n")
    return 0


def pruned(args: argparse.Namespace, options: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run the tool into ``folder / "out"``; what it took, and gained in speed."""
    command = [
        sys.executable, "-m", "tuneutils.tools.prune.cli", args.calibration, "-m", args.model, "-q",
        "-o", str(folder / "out"), "--calibration-rows", str(args.rows),
        "--calibration-length", str(args.length), "--dtype", args.dtype,
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run([*command, *options], check=True)
    metrics = json.loads((folder / "out" / "artifact.json").read_text())["metrics"]
    known = {
        "parameters": metrics["total_parameters"],
        "zeros": metrics["zeros"],
        "seconds": round(time.monotonic() - started, 1),
    }
    log = folder / ".work" / "out" / "run.jsonl"
    if "--no-speed" not in options:
        speed = last_line(log)
        for what in ("prefill", "decode"):
            known[what] = "{value:.2f}× [{low:.2f}, {high:.2f}]".format(**speed[what]["speed_up"])
    return known


if __name__ == "__main__":
    sys.exit(main())
