"""Rule filters of xl-parallel and of OpusFilter on the same pairs: pairs a second and the pairs kept.

    python -m venv opusfilter && opusfilter/bin/pip install opusfilter
    python benchmarks/xl_filter.py PAIRS --opusfilter opusfilter/bin/python [--copies 4]

PAIRS: parallel records, such as xl-parallel extract writes. OpusFilter reads and writes line-aligned
texts, ours records. The rules: lengths in words (1 to 100), their ratio (3), equal digits (OpusFilter's
NonZeroNumeralsFilter at threshold 1; ours compares numbers, placeholders left out), and no pair whose sides
are the same. Two timings: the rules alone on texts in memory, and the whole process with imports, reading and
writing. CPU seconds of one process each on one core, in turns, the median of --rounds.
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

_OPUSFILTER = """
import json, sys, time
from opusfilter.filters import LengthFilter, LengthRatioFilter, NonZeroNumeralsFilter
src, tgt, out = sys.argv[1:4]
pairs = [(a.rstrip("\\n"), b.rstrip("\\n")) for a, b in zip(open(src), open(tgt))]
ready = time.process_time()
rules = [
    LengthFilter(unit="word", min_length=1, max_length=100), LengthRatioFilter(unit="word", threshold=3),
    NonZeroNumeralsFilter(threshold=1),
]
kept = pairs
for rule in rules:
    kept = list(rule.filter(kept))
kept = [p for p in kept if p[0].lower() != p[1].lower()]
done = time.process_time()
with open(out + ".src", "w") as a, open(out + ".tgt", "w") as b:
    for x, y in kept:
        a.write(x + "\\n"); b.write(y + "\\n")
print(json.dumps({"pairs": len(pairs), "kept": len(kept), "rules_s": done - ready}))
"""


def ours(path: Path, out: Path) -> dict[str, float]:
    """The same rules: in memory by the filter's own functions, and as the command runs."""
    from tuneutils.shared.records import read
    from tuneutils.tools.xl_parallel.filtering import BATCH, Filter
    from tuneutils.tools.xl_parallel.params_pairs import FilterParams

    records = read(path)
    params = FilterParams(unit="word", max_length=100, max_ratio=3.0, placeholders=False, duplicates=False)
    start = time.process_time()
    judge = Filter(params)
    kept = sum(
        reason is None
        for i in range(0, len(records), BATCH)
        for reason in judge.reasons(records[i : i + BATCH])
    )
    rules_s = time.process_time() - start
    start = _children()
    command = [sys.executable, "-m", "tuneutils.tools.xl_parallel.cli", "filter", str(path), "-q", "--force"]
    command += [
        "--unit",
        "word",
        "--max-length",
        "100",
        "--no-placeholders",
        "--no-duplicates",
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True)
    return {"pairs": len(records), "kept": kept, "rules_s": rules_s, "all_s": _children() - start}


def opusfilter(python: str, src: Path, tgt: Path, out: Path) -> dict[str, float]:
    start = _children()
    done = subprocess.run(
        [python, "-c", _OPUSFILTER, str(src), str(tgt), str(out)], check=True, capture_output=True, text=True
    )
    return {**json.loads(done.stdout), "all_s": _children() - start}


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--opusfilter", help="python of an environment with OpusFilter")
    parser.add_argument("--copies", type=int, default=4, help="times that the pairs are repeated")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.pairs.open()] * args.copies
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        for side in ("src", "tgt"):
            (folder / side).write_text("".join(f"{r[side]}\n" for r in rows))
        results: dict[str, list[dict[str, float]]] = {"ours": [], "opusfilter": []}
        for _ in range(args.rounds):
            results["ours"].append(ours(folder / "pairs.jsonl", folder / "kept.jsonl"))
            if args.opusfilter:
                results["opusfilter"].append(
                    opusfilter(args.opusfilter, folder / "src", folder / "tgt", folder / "kept")
                )
    for engine, runs in results.items():
        if runs:
            rules, whole = (statistics.median(r["pairs"] / r[k] for r in runs) for k in ("rules_s", "all_s"))
            print(
                f"{engine}: {runs[0]['pairs']} pairs, {runs[0]['kept']} kept; "
                f"{rules:,.0f} pairs/s by the rules, {whole:,.0f} with imports, reading and writing"
            )


if __name__ == "__main__":
    main()
