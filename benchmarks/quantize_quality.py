"""Which scheme loses how much: perplexity, KL and top-1 agreement with the original, with intervals.

    python benchmarks/rescaled.py artifacts/base -o artifacts/rescaled
    python benchmarks/quantize_quality.py artifacts/rescaled --calibration CAL.jsonl --heldout HELD.jsonl

Each scheme is run as the command that a user would give, loaded with Transformers, and scored on the same
windows of held-out text. Intervals are 95 % bootstrap percentiles over windows; the orderings that the papers
promise are paired differences, true when the interval lies on one side of 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from heldout import Heldout, last_line, table

GROUP = ("--group-size", "64")
SCHEMES: dict[str, tuple[str, ...]] = {
    "int8": ("--scheme", "int8"),
    "int8-dynamic": ("--scheme", "int8-dynamic"),
    "llm-int8": ("--scheme", "llm-int8"),
    "nf4": ("--scheme", "nf4"),
    "nf4-double": ("--scheme", "nf4-double"),
    "fp4": ("--scheme", "fp4"),
    "rtn": ("--scheme", "rtn", *GROUP),
    "rtn-symmetric": ("--scheme", "rtn", *GROUP, "--symmetric"),
    "awq": ("--scheme", "awq", *GROUP),
    "awq-symmetric": ("--scheme", "awq", *GROUP, "--symmetric"),
    "gptq": ("--scheme", "gptq", *GROUP),
    "gptq-symmetric": ("--scheme", "gptq", *GROUP, "--symmetric"),
    "mixed-5": ("--scheme", "mixed", *GROUP, "--budget", "5"),
}
CALIBRATED = ("gptq", "awq", "mixed")
#: The first of each pair should have the lower perplexity and KL.
ORDERINGS = [
    ("nf4", "fp4"),
    ("gptq", "rtn"),
    ("gptq-symmetric", "rtn-symmetric"),
    ("awq", "rtn"),
    ("gptq", "awq"),
    ("rtn", "rtn-symmetric"),
    ("gptq", "gptq-symmetric"),
    ("int8", "gptq"),
    ("mixed-5", "gptq-symmetric"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--rows", type=int, default=48, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration row")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="only these")
    parser.add_argument("--keep", type=Path, help="folder of scores: a run that was cut off goes on there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    heldout = Heldout(
        args.model, args.heldout, windows=args.windows, length=args.window, dtype=args.dtype, keep=args.keep
    )
    for name in args.scheme or SCHEMES:
        if name in heldout.rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known = quantized(args, SCHEMES[name], Path(folder))
            row = heldout.add(name, Path(folder) / "out", **known)
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    orderings = heldout.orderings(ORDERINGS)
    print(table(heldout.rows, orderings, ("bits_per_weight", "seconds")))
    if args.out:
        args.out.write_text(json.dumps({"rows": heldout.rows, "orderings": orderings}, indent=2) + "\n")
    return 0


def quantized(args: argparse.Namespace, options: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run the tool into ``folder / "out"``; what its manifest and its run log say."""
    command = [sys.executable, "-m", "tuneutils.tools.quantize.cli", args.model, "-q", *options]
    command += ["-o", str(folder / "out"), "--dtype", args.dtype]
    if options[1] in CALIBRATED:
        command += ["--calibration", args.calibration, "--calibration-rows", str(args.rows)]
        command += ["--calibration-length", str(args.length)]
    subprocess.run(command, check=True)
    metrics = json.loads((folder / "out" / "artifact.json").read_text())["metrics"]
    log = last_line(folder / ".work" / "out" / "run.jsonl")
    return {"bits_per_weight": metrics["bits_per_weight"]} | log


if __name__ == "__main__":
    sys.exit(main())
