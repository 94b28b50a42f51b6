"""Our task engine beside lm-evaluation-harness on one task file and model: agreement and time.

    python benchmarks/harness_agreement.py MODEL TASK.yaml [--limit N] [--max-length N] [--dtype float32]

Both run in one process on the same loaded model, one after the other. Prints the largest difference of a
log-likelihood, the questions on which the choice differs, and both times (float64 by default, so that the
rounding of different batches does not hide a difference of method; in float32 it reaches some 1e-4 on
continuations of dozens of tokens). Exits 1 when a log-likelihood differs by more than 1e-4 or an accuracy
at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.command import Run
from tuneutils.shared.models import load_model
from tuneutils.tools.lm_bench.harness import run_harness
from tuneutils.tools.lm_bench.measure import run_task
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.params import Params
from tuneutils.tools.lm_bench.tasks import load_task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    args = parser.parse_args()
    import torch

    loaded = load_model(args.model, dtype=getattr(torch, args.dtype))
    params = Params(
        task=(args.task,), engine="harness", limit=args.limit, max_length=args.max_length, batch_tokens=4096
    )
    started = time.perf_counter()
    ours = run_task(params, loaded, load_task(args.task, limit=args.limit))
    own_s = time.perf_counter() - started
    measured = Measured("model", {})
    started = time.perf_counter()
    run_harness(Run("lm-bench", params), loaded, measured)
    harness_s = time.perf_counter() - started
    theirs = next(iter(measured.items.values()))
    found = compare(ours, theirs)
    found.update(dtype=args.dtype, own_s=round(own_s, 2), harness_s=round(harness_s, 2))
    print(json.dumps(found, indent=2))
    return 0 if found["agrees"] else 1


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest difference of a log-likelihood, and the items whose accuracy differs."""
    gaps = [
        abs(a - b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    names = [n for n in ("acc", "acc_norm", "acc_bytes") if n in theirs[0]]
    differ = [
        i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if any(x[n] != y[n] for n in names)
    ]
    return {
        "items": len(ours),
        "loglikelihoods": len(gaps),
        "largest_difference": max(gaps),
        "items_judged_differently": differ,
        "accuracy": {n: sum(i[n] for i in ours) / len(ours) for n in names},
        "agrees": max(gaps) <= 1e-4 and not differ,
    }


if __name__ == "__main__":
    sys.exit(main())
