"""Near duplicates and data selection beside other packages: documents a second, pairs found, same selection.

    python -m venv datatrove && datatrove/bin/pip install "datatrove[processing]" spacy
    python -m venv textdedup && textdedup/bin/pip install torch==2.13.0 text-dedup
    python -m venv dsir && dsir/bin/pip install data-selection
    python benchmarks/corpus_dedup.py RECORDS --datatrove datatrove/bin/python \
        --textdedup textdedup/bin/python --dsir dsir/bin/python

The first ``--documents`` texts of RECORDS, and of every tenth a version with 1 to 8 % of its words changed.
All take word 5-grams and threshold .8, on one core, one process each; times are CPU seconds, children
included, since a busy machine changes them least. Recall: of the pairs whose exact Jaccard similarity is at
least .8, those that end in one cluster. DSIR: the same quarter of the documents for the same seed and hash.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path

SEED = 1
ENGINES = ("ours", "textdedup", "datatrove")


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def ours(texts: list[str], _: Path) -> list[tuple[int, int]]:
    import numpy as np

    from tuneutils.shared.neardup import band_keys, similar_pairs
    from tuneutils.tools.corpus_build.tokens import shingles, tokenize

    keys, sets = [], []
    for start in range(0, len(texts), 500):
        grams, bounds = shingles(tokenize(texts[start : start + 500]).words(), 5)
        keys.append(band_keys(grams, bounds))
        sets += [grams[a:b] for a, b in pairwise(bounds)]
    return list(similar_pairs(np.concatenate(keys), lambda i: np.unique(sets[i]), 0.8))


def textdedup(texts: list[str], _: Path) -> list[tuple[int, int]]:
    import numpy as np
    from text_dedup.minhash import embed_func
    from text_dedup.utils import optimal_param, sha1_hash

    prime, perms = np.uint64((1 << 61) - 1), 256
    rng = np.random.RandomState(42)
    bands, rows = optimal_param(0.8, perms, 0.5, 0.5)
    ranges = [(i * rows, (i + 1) * rows) for i in range(bands)]
    drawn = (
        rng.randint(1, prime, size=(perms,), dtype=np.uint64),
        rng.randint(0, prime, size=(perms,), dtype=np.uint64),
    )
    tables = [defaultdict(list) for _ in range(bands)]
    for i, text in enumerate(texts):
        made = embed_func(
            text, i, num_perm=perms, ngram_size=5, min_length=5, hashranges=ranges, permutations=drawn,
            hash_func=sha1_hash, dtype=np.uint64, max_hash=np.uint32((1 << 32) - 1), modulo_prime=prime,
        )  # fmt: skip
        for table, key in zip(tables, made["__signatures__"]):
            table[key].append(i)
    return [(group[0], other) for table in tables for group in table.values() for other in group[1:]]


def datatrove(texts: list[str], work: Path) -> list[tuple[int, int]]:
    import struct

    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature

    config = MinhashConfig(n_grams=5)
    documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts))
    MinhashDedupSignature(str(work / "s"), config=config).run(documents, 0, 1)
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(str(work / "s"), str(work / "b"), config=config).run(
            None, bucket, config.num_buckets
        )
    pairs = []
    for path in (work / "b").glob("*.dups"):
        data = path.read_bytes()
        pairs += [(a, b) for _, a, _, b in struct.iter_unpack("<4I", data)]
    return pairs


def clusters(pairs: list[tuple[int, int]], count: int) -> list[int]:
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        parent[root(a)] = root(b)
    return [root(i) for i in range(count)]


def exact_pairs(texts: list[str]) -> list[tuple[int, int]]:
    """All pairs of Jaccard similarity .8 and more, over an inverted index."""
    sets, index = [], defaultdict(list)
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[j : j + 5]) for j in range(len(words) - 4)})
        for gram in sets[-1]:
            index[gram].append(i)
    candidates = {p for group in index.values() if 1 < len(group) < 50 for p in combinations(group, 2)}
    return [(a, b) for a, b in candidates if len(sets[a] & sets[b]) >= 0.8 * len(sets[a] | sets[b])]


def dsir_ours(texts: list[str], target: list[str]) -> list[int]:
    from tuneutils.tools.corpus_build import dsir

    featurizer = dsir.Featurizer("sha256")
    features, bounds = featurizer(texts)
    ratio = dsir.log_ratio(dsir.target_counts([target], featurizer), dsir.bucket_counts(features))
    weights = dsir.log_weights(features, bounds, ratio)
    long = (bounds[1:] - bounds[:-1] + 1) // 2 >= 100  # the package leaves out texts of under 100 tokens
    return [int(i) for i in dsir.gumbel_top_k(weights, len(texts) // 4, SEED, allowed=long)]


def dsir_reference(texts: list[str], target: list[str], work: Path) -> list[int]:
    import numpy as np
    from data_selection import HashedNgramDSIR

    for name, given in (("raw", texts), ("target", target)):
        lines = "".join(json.dumps({"text": t, "i": i}) + "\n" for i, t in enumerate(given))
        (work / f"{name}.jsonl").write_text(lines)
    made = HashedNgramDSIR(
        [str(work / "raw.jsonl")], [str(work / "target.jsonl")], str(work / "c"), num_proc=1
    )
    made.fit_importance_estimator(num_tokens_to_fit="all")
    made.compute_importance_weights()
    np.random.seed(SEED)
    made.resample(out_dir=str(work / "o"), num_to_sample=len(texts) // 4, cache_dir=str(work / "r"))
    return sorted(json.loads(line)["i"] for path in (work / "o").rglob("*.jsonl") for line in path.open())


def child(engine: str, given: Path) -> None:
    data = json.loads(given.read_text())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "warm").mkdir()  # imports and tables are not timed
        few = data["texts"][:50]
        if engine == "dsir":
            dsir_ours(few, data["target"])
        elif engine == "dsir-reference":
            import data_selection  # noqa: F401
        else:
            globals()[engine](few, work / "warm")
        start = cpu_seconds()
        if engine == "dsir":
            result = dsir_ours(data["texts"], data["target"])
        elif engine == "dsir-reference":
            result = dsir_reference(data["texts"], data["target"], work)
        else:
            result = globals()[engine](data["texts"], work)
        print("RESULT " + json.dumps({"seconds": cpu_seconds() - start, "result": [*map(_plain, result)]}))


def _plain(value: object) -> object:
    return [int(v) for v in value] if isinstance(value, tuple) else int(value)


def run(python: str, engine: str, given: Path) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [python, __file__, "--child", engine, str(given)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{engine}: {done.stderr[-800:]}")
    return json.loads(lines[0][7:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("records", nargs="?")
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--target", help="records that show the domain; default the last 300 of RECORDS")
    for engine in ("datatrove", "textdedup", "dsir"):
        parser.add_argument(f"--{engine}", help=f"python with {engine}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]))
        return
    texts = [json.loads(line)["text"] for line in Path(args.records).read_text().splitlines()]
    target = texts[-300:]
    if args.target:
        target = [json.loads(line)["text"] for line in Path(args.target).read_text().splitlines()]
    texts = texts[: args.documents]
    rng = random.Random(0)
    for text in texts[::10]:
        words = text.split()
        for _ in range(max(1, int(len(words) * rng.uniform(0.01, 0.08)))):
            words[rng.randrange(len(words))] = f"changed{rng.randrange(10**6)}"
        texts.append(" ".join(words))
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "given.json"
        given.write_text(json.dumps({"texts": texts, "target": target}))
        size = sum(len(t.encode()) for t in texts) / 1e6
        true = exact_pairs(texts)
        print(f"{len(texts)} documents, {size:.1f} MB, {len(true)} pairs of Jaccard .8 and more")
        pythons = {"ours": sys.executable, "textdedup": args.textdedup, "datatrove": args.datatrove}
        for engine in ENGINES:
            if pythons[engine]:
                made = run(pythons[engine], engine, given)
                of = clusters(made["result"], len(texts))
                recall = sum(of[a] == of[b] for a, b in true) / max(len(true), 1)
                print(f"{engine:15s} {len(texts) / made['seconds']:9.0f} documents/s   recall {recall:.4f}   "
                      f"removed {len(texts) - len(set(of))}")  # fmt: skip
        mine = run(sys.executable, "dsir", given)
        print(f"{'dsir, ours':15s} {len(texts) / mine['seconds']:9.0f} documents/s")
        if args.dsir:
            theirs = run(args.dsir, "dsir-reference", given)
            same = len(set(mine["result"]) & set(theirs["result"])) / max(len(theirs["result"]), 1)
            print(f"{'data-selection':15s} {len(texts) / theirs['seconds']:9.0f} documents/s   "
                  f"selection in common {same:.4f} of {len(theirs['result'])}")  # fmt: skip


if __name__ == "__main__":
    main()
