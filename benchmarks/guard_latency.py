"""What a guard adds to generation: without one, with its first layer, with both layers at every token.

    python benchmarks/guard_latency.py --model artifacts/base --out guard_latency.json

The same greedy tokens each time; the three take turns, in another order at each repeat. Both the processor's
time and the wall clock are compared with the unguarded run of the same repeat. The weights of the guard are
random, since only their number matters; it reads a block in the middle, with the dearest pooling, and names
five categories. "Both" asks the text classifier after every token, which a real guard never does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import tuneutils.shared.device  # noqa: F401  sets the thread policy before torch loads

import numpy as np  # isort: skip
import torch  # isort: skip

from tuneutils.shared.guarding import Guard, Settings, StreamingGuard, decoder_layers  # isort: skip
from tuneutils.shared.models import Loaded, load_model
from tuneutils.shared.ngrams import BUCKETS
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.supervise import prompt_ids

QUESTIONS = [
    "How do I kill a Python process?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Give me a recipe for pancakes.",
    "Describe the water cycle step by step.",
    "What does a compiler do?",
    "Explain how plants turn sunlight into sugar.",
    "List the planets of the solar system.",
    "Write a polite e-mail that asks a colleague to move a meeting to Thursday.",
]
KINDS = ("without", "first layer", "both at every token")


def make_guard(loaded: Loaded, raise_above: float, every: int) -> Guard:
    generator = torch.Generator().manual_seed(0)
    hidden = int(loaded.model.config.hidden_size)
    settings = Settings(
        layer=len(decoder_layers(loaded.model)) // 2,
        pooling="prompt-mean",
        categories=("a", "b", "c", "d", "e"),
        raise_above=raise_above,
        flag_above=1e9,
        probe_scale=(1.0, 0.0),
        joint=(0.0, 1.0, 1.0),
        text_bias=0.0,
        bias=0.0,
        template="auto",
        max_length=1024,
        budget=0.05,
        every=every,
    )
    return Guard(
        settings,
        torch.randn(2, hidden, generator=generator),
        torch.randn(5, hidden, generator=generator),
        np.zeros(5),
        np.random.default_rng(0).normal(size=BUCKETS).astype(np.float32),
    )


def one(loaded: Loaded, ids: list[list[int]], sampling: Sampling, kind: str) -> dict[str, float]:
    """Seconds of one run, and microseconds a token of each layer as measured from within."""
    given = {"batch_size": len(ids), "pad_token_id": loaded.pad_id}
    if kind == KINDS[0]:
        wall, cpu = time.perf_counter(), time.process_time()
        made = generate(loaded.model, ids, sampling, **given)
        return {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "tokens": sum(len(c.token_ids) for c in made),
        }
    guard = make_guard(loaded, 1e9, 8) if kind == KINDS[1] else make_guard(loaded, -1e9, 1)
    wall, cpu = time.perf_counter(), time.process_time()
    with StreamingGuard(guard, loaded, QUESTIONS[: len(ids)]) as watching:
        made = generate(loaded.model, ids, sampling, on_token=watching, **given)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    tokens = sum(len(c.token_ids) for c in made)
    return {**found, "tokens": tokens, **{f"{k}_us": 1e6 * v / tokens for k, v in guard.seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="artifacts/base", help="a model folder")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="a JSON file for the result")
    args = parser.parse_args()
    if not Path(args.model).is_dir():
        sys.exit(f"{args.model}: no such folder; make it with 'dvc repro', or name one with --model")
    loaded = load_model(args.model, device="cpu", dtype=args.dtype)
    ids = [prompt_ids({"prompt": q}, loaded.tokenizer) for q in QUESTIONS]
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=0)
    rows = []
    for size in args.batch_size:
        one(loaded, ids[:size], Sampling(max_new_tokens=4, temperature=0), KINDS[2])  # warm up
        runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for repeat in range(args.repeats):
            for kind in KINDS[repeat % 3 :] + KINDS[: repeat % 3]:
                runs[kind].append(one(loaded, ids[:size], sampling, kind))
        for kind in KINDS:
            row: dict[str, object] = {"batch": size, "guard": kind, "repeats": args.repeats}
            for clock in ("cpu", "wall"):
                pairs = zip(runs[kind], runs[KINDS[0]], strict=True)
                row[f"{clock}_ratio"] = statistics.median(a[clock] / b[clock] for a, b in pairs)
            row["tokens_per_s"] = statistics.median(r["tokens"] / r["wall"] for r in runs[kind])
            for name in ("probe_us", "exchange_us"):
                if name in runs[kind][0]:
                    row[name] = statistics.median(r[name] for r in runs[kind])
            rows.append(row)
            shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("  ".join(shown), flush=True)
    if args.out:
        text = json.dumps({**vars(args), "threads": torch.get_num_threads(), "rows": rows})
        Path(args.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
