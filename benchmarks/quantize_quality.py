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
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import numpy as np
import torch
from torch import Tensor

from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.evaluate import Estimate, paired_difference, ratio_estimate
from tuneutils.shared.models import keep_4bit_layout, load_model

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
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu", dtype=args.dtype)
    ids = calibration_ids([args.heldout], loaded.tokenizer, rows=args.windows, length=args.window, seed=1)
    base = [logits.to(torch.bfloat16) for logits in all_logits(loaded.model, ids)]
    del loaded
    scores = {"original": score(base, base, ids)}
    rows = {"original": row(scores["original"], scores["original"], {})}
    for name in args.scheme or SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            made, metrics, log = quantized(args, SCHEMES[name], Path(folder))
            scores[name] = score(base, all_logits(made, ids), ids)
            rows[name] = row(scores[name], scores["original"], metrics) | log
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    orderings = [ordering(a, b, scores) for a, b in ORDERINGS if a in scores and b in scores]
    print(table(rows, orderings))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "orderings": orderings}, indent=2) + "\n")
    return 0


def quantized(
    args: argparse.Namespace, options: tuple[str, ...], folder: Path
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model that the tool wrote, its metrics and its run log."""
    calibrate = [
        "--calibration", args.calibration, "--calibration-rows", str(args.rows),
        "--calibration-length", str(args.length),
    ]  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "tuneutils.tools.quantize.cli",
        args.model,
        "-q",
        "-o",
        str(folder / "out"),
    ]
    subprocess.run([*command, *options, *calibrate], check=True)
    metrics = json.loads((folder / "out" / "artifact.json").read_text())["metrics"]
    log = json.loads((folder / ".work" / "out" / "run.jsonl").read_text().splitlines()[-1])
    model = load_model(str(folder / "out"), device="cpu", dtype=args.dtype).model
    keep_4bit_layout(model)
    return model, metrics, log


@torch.no_grad()
def all_logits(model: Any, ids: Tensor) -> list[Tensor]:
    """``(window - 1, vocabulary)`` a window."""
    return [model(window[None]).logits[0, :-1] for window in ids]


def score(base: list[Tensor], logits: list[Tensor], ids: Tensor) -> dict[str, np.ndarray]:
    """Sums over each window: negative log-likelihood, KL from the original, agreements, tokens."""
    found: dict[str, list[float]] = {"nll": [], "kl": [], "agree": [], "tokens": []}
    for one, other, window in zip(base, logits, ids, strict=True):
        p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        found["nll"].append(-float(q.gather(-1, window[1:, None]).sum()))
        found["kl"].append(float((p.exp() * (p - q)).sum()))
        found["agree"].append(float((p.argmax(-1) == q.argmax(-1)).sum()))
        found["tokens"].append(float(len(window) - 1))
    return {name: np.array(values) for name, values in found.items()}


def row(
    own: dict[str, np.ndarray], original: dict[str, np.ndarray], metrics: dict[str, Any]
) -> dict[str, Any]:
    loss = paired_difference(own["nll"], original["nll"], own["tokens"], original["tokens"])
    return {
        "bits_per_weight": metrics.get("bits_per_weight"),
        "perplexity": ratio_estimate(own["nll"], own["tokens"], transform=np.exp).as_json(),
        "perplexity_change": [math.exp(v or 0) - 1 for v in (loss.value, loss.low, loss.high)],
        "kl": ratio_estimate(own["kl"], own["tokens"]).as_json(),
        "top1": ratio_estimate(own["agree"], own["tokens"]).as_json(),
    }


def ordering(better: str, worse: str, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Whether one scheme's loss and KL are below another's, by paired windows."""
    found: dict[str, Any] = {"better": better, "worse": worse}
    for name in ("nll", "kl"):
        a, b = scores[better], scores[worse]
        gap: Estimate = paired_difference(a[name], b[name], a["tokens"], b["tokens"])
        assert gap.low is not None
        assert gap.high is not None
        verdict = "true" if gap.high < 0 else "false" if gap.low > 0 else "open"
        found[name] = gap.as_json() | {"holds": verdict}
    return found


def table(rows: dict[str, dict[str, Any]], orderings: list[dict[str, Any]]) -> str:
    lines = [
        "| scheme | bits/weight | perplexity | change | KL | top-1 | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        change = "{:+.1%} ({:+.1%} to {:+.1%})".format(*r["perplexity_change"])
        kl = "{value:.4f} ({low:.4f}-{high:.4f})".format(**r["kl"])
        bits, seconds = r["bits_per_weight"] or "", r.get("seconds", "")
        lines.append(
            f"| {name} | {bits} | {r['perplexity']['value']:.2f} | {change} | {kl} "
            f"| {r['top1']['value']:.3f} | {seconds} |"
        )
    lines += ["", "| ordering | loss, nats a token | KL | holds |", "|---|---|---|---|"]
    for o in orderings:
        gaps = ["{value:+.4f} ({low:+.4f} to {high:+.4f})".format(**o[name]) for name in ("nll", "kl")]
        verdict = "/".join(o[name]["holds"] for name in ("nll", "kl"))
        lines.append(f"| {o['better']} < {o['worse']} | {gaps[0]} | {gaps[1]} | {verdict} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
