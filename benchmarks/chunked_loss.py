"""Chunked against plain cross-entropy: time, peak memory growth, and how far the gradients differ.

    python benchmarks/chunked_loss.py --out chunked_loss.json
    python benchmarks/chunked_loss.py --train-weight --device cuda --dtype bfloat16 --tokens 16384

Each measurement is a process of its own, plain and chunked in turn; medians are printed. The loss and its
backward pass through hidden states (and, with --train-weight, through the projection) are timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import tuneutils.shared.device  # noqa: F401  sets the thread policy before torch loads

import torch  # isort: skip
import torch.nn.functional as F  # isort: skip

from tuneutils.shared.logprobs import chunked_cross_entropy  # isort: skip

KINDS = ("plain", "chunked")


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What a causal model of transformers computes: all logits, then the loss in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


LOSSES = {"plain": plain_loss, "chunked": chunked_cross_entropy}


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(args.tokens, args.hidden, **options).requires_grad_()
    weight = torch.empty(args.vocab, args.hidden, **options).normal_(std=0.05)
    labels = torch.randint(0, args.vocab, (args.tokens,), device=args.device)
    labels[torch.rand(args.tokens, device=args.device) < args.masked] = -100
    return hidden, weight.requires_grad_(args.train_weight), labels


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory growth of the first loss and gradient, seconds of the second."""
    hidden, weight, labels = inputs(args)
    tensors = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    few = hidden[:4].detach().clone().requires_grad_()  # first, the libraries' own buffers
    torch.autograd.grad(chunked_cross_entropy(few, weight[:64].detach(), labels[:4].clamp(max=63)), few)
    before = peak_bytes(args.device)
    torch.autograd.grad(LOSSES[kind](hidden, weight, labels), tensors)
    growth = peak_bytes(args.device) - before
    start = time.perf_counter()
    torch.autograd.grad(LOSSES[kind](hidden, weight, labels), tensors)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "peak_growth_bytes": growth}


def difference(args: argparse.Namespace) -> dict[str, float]:
    """Relative differences of the loss and of each gradient."""
    hidden, weight, labels = inputs(args)
    names = ["hidden", "weight"] if args.train_weight else ["hidden"]
    tensors = [hidden, weight][: len(names)]
    plain, chunked = (LOSSES[kind](hidden, weight, labels) for kind in KINDS)
    result = {"loss_relative_difference": abs(chunked / plain - 1).item()}
    pairs = zip(torch.autograd.grad(plain, tensors), torch.autograd.grad(chunked, tensors), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        a, b = a.double(), b.double()
        result[f"grad_{name}_relative_difference"] = ((a - b).norm() / a.norm()).item()
    return result


def in_subprocess(task: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--task", task]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--masked", type=float, default=0.5, help="share of tokens without a label")
    parser.add_argument("--train-weight", action="store_true", help="the projection learns too")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="a JSON file for the result")
    parser.add_argument("--task", choices=[*KINDS, "difference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task == "difference":
        print(json.dumps(difference(args)))
        return
    if args.task:
        print(json.dumps(measure(args.task, args)))
        return

    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind in KINDS:
            runs[kind].append(in_subprocess(kind))
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "task")}
    row: dict[str, object] = {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__}
    medians = {}
    for kind in KINDS:
        for key in ("seconds", "peak_growth_bytes"):
            medians[kind, key] = statistics.median(run[key] for run in runs[kind])
            row[f"{kind}_{key}"] = medians[kind, key]
    row["time_ratio"] = medians["plain", "seconds"] / medians["chunked", "seconds"]
    growth = max(medians["chunked", "peak_growth_bytes"], 1)
    row["memory_ratio"] = medians["plain", "peak_growth_bytes"] / growth
    row.update(in_subprocess("difference"))
    for key, value in row.items():
        print(f"{key:36} {value:.4g}" if isinstance(value, float) else f"{key:36} {value}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
