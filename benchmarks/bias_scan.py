"""``bias-scan data`` beside GenBit: rows a second; memory by the size of the input; rows a second by workers.

    python -m venv genbit && genbit/bin/pip install --no-deps genbit==2.2.0.0 && genbit/bin/pip install numpy scipy nltk stopwordsiso
    python benchmarks/bias_scan.py RECORDS... --genbit genbit/bin/python --sizes 10 30 100 300 1000

Both get the same texts in memory, in a process of its own on one core, and end with their scores: GenBit for
gender with its lemmatizer stubbed out (stanza takes some 10 ms a word), ours for all eight axes with intervals.
Seconds are CPU seconds, so that a busy machine does not blur the ratio; the two
take turns, and the median of the passes is shown. Inputs of a given size are rows of RECORDS with three rare
words each, so that the vocabulary never ends.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PASSES = 3


def texts_of(paths: Sequence[str]) -> list[str]:
    rows = [json.loads(line) for path in paths for line in Path(path).read_bytes().splitlines()]
    return ["\n".join(v for v in row.values() if isinstance(v, str)) for row in rows]


def genbit(texts: list[str]) -> float:
    import types

    sys.modules["stanza"] = types.ModuleType("stanza")
    import genbit.metrics_calculation as calculation
    from genbit.genbit_metrics import GenBitMetrics

    class Same:
        def __init__(self, language: str) -> None:
            pass

        def lemmatize_token(self, token: str) -> str:
            return token

    calculation.Lemmatizer = Same
    metrics = GenBitMetrics("en")
    start = time.process_time()
    metrics.add_data(texts)
    metrics.get_metrics(output_word_list=False)
    return time.process_time() - start


def ours(texts: list[str]) -> float:
    import zlib

    import numpy as np

    from tuneutils.tools.bias_scan.near import Window
    from tuneutils.tools.bias_scan.params import DataParams
    from tuneutils.tools.bias_scan.scan import Settings
    from tuneutils.tools.bias_scan.scan_data import lexicons_of
    from tuneutils.tools.bias_scan.scores import Scores
    from tuneutils.tools.bias_scan.stopwords import STOP_WORDS
    from tuneutils.tools.bias_scan.tally import SHARDS, Batch

    lexicons = tuple(lexicons_of(DataParams()))
    settings = Settings(lexicons, Window(), STOP_WORDS, (), 300, 0)
    tally = settings.tally()
    lines = [text.encode() for text in texts]
    start = time.process_time()
    for at in range(0, len(texts), 2048 * SHARDS):
        part = texts[at : at + 2048 * SHARDS]
        crcs = np.array(list(map(zlib.crc32, lines[at : at + len(part)])))
        for shard in range(SHARDS):
            own = np.flatnonzero(crcs % SHARDS == shard)
            tally.add(Batch(shard, [part[i] for i in own.tolist()], crcs[own], "x", (own + at).tolist()))
    Scores(tally, {}, 100, 0).all()
    return time.process_time() - start


def in_child(python: str, what: str, *args: str) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, __file__, "--child", what, *args], capture_output=True, text=True, env=env, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(what: str, args: Sequence[str]) -> None:
    if what in ("genbit", "ours"):
        repeat, *paths = args
        texts = texts_of(paths) * int(repeat)
        seconds = (genbit if what == "genbit" else ours)(texts)
        print(json.dumps({"rows_per_s": len(texts) / seconds, "rows": len(texts)}))
        return
    from tuneutils.tools.bias_scan.cli import main

    path, workers, out = args
    start = time.perf_counter()
    try:
        main(["data", path, "-o", out, "--workers", workers, "-q"])
    except SystemExit as done:
        if done.code:
            raise
    seconds = time.perf_counter() - start
    rows = json.loads(Path(out, "report.json").read_text())["facts"]["rows"]
    peak = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    )
    print(
        json.dumps(
            {"rows": rows, "seconds": seconds, "cpu_s": sum(os.times()[:4]), "peak_rss_bytes": peak * 1024}
        )
    )


def write_input(path: Path, texts: list[str], size: int) -> None:
    rng = random.Random(0)
    written = 0
    with open(path, "wb") as sink:
        while written < size:
            rare = ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(3))
            row = {"text": f"{rng.choice(texts)} {' '.join(rare)}"}
            written += sink.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+")
    parser.add_argument("--genbit", help="python of an environment with GenBit")
    parser.add_argument("--repeat", type=int, default=10, help="times that the rows are taken")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 30, 100, 300], help="MB")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="on the greatest size")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"ours": [], "genbit": []}
    for _ in range(PASSES if args.genbit else 0):
        rates["ours"].append(in_child(sys.executable, "ours", str(args.repeat), *args.records)["rows_per_s"])
        rates["genbit"].append(in_child(args.genbit, "genbit", str(args.repeat), *args.records)["rows_per_s"])
    if args.genbit:
        both = {name: statistics.median(found) for name, found in rates.items()}
        ratio = both["ours"] / both["genbit"]
        print(f"bias-scan {both['ours']:,.0f} rows/s, GenBit {both['genbit']:,.0f}: {ratio:.1f}×")
    texts = texts_of(args.records)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.jsonl")
        for i, size in enumerate(args.sizes):
            write_input(path, texts, size * 1_000_000)
            for workers in args.workers if i == len(args.sizes) - 1 else [1]:
                got = in_child(
                    sys.executable, "scan", str(path), str(workers), str(Path(folder, f"{size}-{workers}"))
                )
                rate, peak = got["rows"] / got["seconds"], got["peak_rss_bytes"] / 1e6
                speed = f"{rate:,.0f} rows/s, {size / got['seconds']:.1f} MB/s, {got['cpu_s']:.0f} s of CPU"
                print(f"{size} MB, {workers} workers: {speed}, peak {peak:,.0f} MB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
