"""Our GPTQ, Wanda and SparseGPT beside llm-compressor's and GPTQModel's: time, memory, and quality.

    python -m venv llmc && llmc/bin/pip install torch==2.13.0
    llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0
    python -m venv gptqm && gptqm/bin/pip install torch==2.13.0 setuptools
    gptqm/bin/pip install torch==2.13.0 gptqmodel==7.6.0
    python benchmarks/compress_peers.py artifacts/rescaled --calibration CAL.jsonl --heldout HELD.jsonl \\
        --llmcompressor llmc/bin/python --gptqmodel gptqm/bin/python

All get the same rows of token ids, group and model; engines take turns within a round, each in a process of
its own, and each is timed from reading the model to the written result (peers/compress.py). A peer's result
is loaded by Transformers, or dequantized by the peer. Each row is written to --out as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from heldout import Heldout, table

from tuneutils.shared.calibration import calibration_ids
from tuneutils.shared.models import load_tokenizer, resolve

#: On two cores GPTQModel 7.6 makes one worker and asks for two loader threads, and fails without the second.
SETTINGS = {"PYTHONPATH": "", "GPTQMODEL_CPU_WORKERS": str(max(2, (os.cpu_count() or 1) // 2))}
#: Method -> engines, ours first.
ENGINES = {
    "gptq": ("tuneutils", "llmcompressor", "gptqmodel"),
    "wanda": ("tuneutils", "llmcompressor"),
    "sparsegpt": ("tuneutils", "llmcompressor"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--llmcompressor", help="Python of its environment; absent: left out")
    parser.add_argument("--gptqmodel", help="Python of its environment; absent: left out")
    parser.add_argument("--method", action="append", choices=ENGINES, help="only these")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=256, help="tokens of a calibration row")
    parser.add_argument("--batch", type=int, default=16, help="rows of a forward pass, of the peers")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--keep", type=Path, help="folder of scores: a run that was cut off goes on there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pythons = {"tuneutils": sys.executable, "llmcompressor": args.llmcompressor, "gptqmodel": args.gptqmodel}
    heldout = Heldout(
        args.model, args.heldout, windows=args.windows, length=args.window, dtype=args.dtype, keep=args.keep
    )
    orderings = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ids = calibration_ids(
            [args.calibration], load_tokenizer(resolve(args.model)), rows=args.rows, length=args.length
        )
        (work / "ids.json").write_text(json.dumps(ids.tolist()))
        for method in args.method or ENGINES:
            engines = [engine for engine in ENGINES[method] if pythons[engine]]
            orderings += [(f"{method}, tuneutils", f"{method}, {engine}") for engine in engines[1:]]
            if all(f"{method}, {engine}" in heldout.rows for engine in engines):
                continue
            times: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
            for _ in range(args.rounds):
                for engine in engines:
                    times[engine].append(compress(args, engine, method, str(pythons[engine]), work))
                    print(method, engine, json.dumps(times[engine][-1]), file=sys.stderr, flush=True)
            for engine in engines:
                heldout.add(f"{method}, {engine}", loadable(work / engine), **summary(times[engine]))
            save(args.out, heldout, orderings)
    print(table(heldout.rows, heldout.orderings(orderings), ("seconds", "cpu_seconds", "peak_mib")))
    return 0


def compress(args: argparse.Namespace, engine: str, method: str, python: str, work: Path) -> dict[str, Any]:
    """One run of one engine into ``work / engine``; what it took."""
    shutil.rmtree(work / engine, ignore_errors=True)
    wanted = {
        "engine": engine,
        "method": method,
        "model": str(Path(args.model).resolve()),
        "records": str(Path(args.calibration).resolve()),
        "ids": str(work / "ids.json"),
        "out": str(work / engine),
        "rows": args.rows,
        "length": args.length,
        "batch": args.batch,
        "group_size": args.group_size,
        "symmetric": False,
        "dtype": args.dtype,
    }
    script = Path(__file__).parent / "peers" / "compress.py"
    done = subprocess.run(
        [python, str(script), json.dumps(wanted)], capture_output=True, text=True,
        cwd=work, env=os.environ | SETTINGS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{engine}, {method}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def loadable(folder: Path) -> Path:
    """The result in a form that Transformers reads into plain weights."""
    plain = folder.with_name(f"{folder.name}-plain")
    if plain.exists():  # dequantized by the peer
        return plain
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if (stored := config.get("quantization_config")) and stored["quant_method"] == "compressed-tensors":
        stored["dequantize"] = True
        path.write_text(json.dumps(config))
    return folder


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds."""
    found = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {
        "seconds": round(found["seconds"], 1),
        "cpu_seconds": round(found["cpu_seconds"], 1),
        "peak_mib": round(found["peak_rss_bytes"] / 2**20),
        "runs": runs,
    }


def save(path: Path | None, heldout: Heldout, orderings: list[tuple[str, str]]) -> None:
    if path:
        made = {"rows": heldout.rows, "orderings": heldout.orderings(orderings)}
        path.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
