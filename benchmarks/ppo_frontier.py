"""Reward against KL on the real model with rewards that can be computed exactly, beside best-of-n.

    python benchmarks/ppo_frontier.py exact --model artifacts/base
    python benchmarks/ppo_frontier.py sampled --model artifacts/rlhf/sft \\
        --prompts artifacts/rlhf/preferences/reward.jsonl --heldout artifacts/rlhf/preferences/heldout.jsonl

PPO is run once for each coefficient of the KL penalty and each seed. The optimum of each, π ∝ π_ref·exp(r/β),
has the highest reward that its KL allows, so it lies on or above best-of-n; a run that has not converged, or
a policy that cannot represent it, may lie below.

``exact``: answers of one token, rewarded for their letters. KL and reward of a policy are sums over the whole
vocabulary, without sampling error, and so are those of the optimum and of best-of-n, whose n need not be a
whole number (the best's distribution function is F^n).

``sampled``: longer answers to held-out prompts, measured by ``ppo-run compare`` with the first policy's
best-of-n, interpolated in KL; beyond the largest n a policy is compared with that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MOST_LETTERS = 12
Floats = np.ndarray[Any, np.dtype[np.float64]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("setting", choices=("exact", "sampled"))
    parser.add_argument("--model", required=True, help="the SFT model")
    parser.add_argument("--prompt", default="The", help="of the exact setting")
    parser.add_argument("--prompts", help="of the sampled setting")
    parser.add_argument("--heldout", help="of the sampled setting")
    parser.add_argument("--reward", default="builtin:length:8", help="of the sampled setting")
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.3, 0.1, 0.03])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, help="16 of the sampled setting, all of the exact")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of the sampled setting")
    parser.add_argument("--limit", type=int, default=160, help="held-out prompts")
    parser.add_argument("--best-of", type=int, default=16)
    parser.add_argument("--work", help="where policies and the report go; what is there is not made again")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    work = Path(args.work or tempfile.mkdtemp()).resolve()
    work.mkdir(parents=True, exist_ok=True)
    {"exact": exact, "sampled": sampled}[args.setting](args, work)


def recipe(args: argparse.Namespace, kl_coef: float) -> list[str]:
    options = {
        "kl-coef": kl_coef,
        "updates": args.updates,
        "learning-rate": args.learning_rate,
        "batch-size": args.batch_size,
        "minibatches": 2,
        "ppo-epochs": 2,
        "micro-batch-size": args.micro_batch_size or (16 if args.setting == "sampled" else args.batch_size),
        "rollout-batch-size": 64,
        "missing-eos": "none",
        "checkpoint-every": 0,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def call(*line: Any, cwd: Path | None = None) -> None:
    subprocess.run([str(word) for word in line], check=True, cwd=cwd)


def letters(_prompts: list[str], completions: list[str]) -> list[float]:
    """Letters over ``MOST_LETTERS``, at most 1."""
    return [min(sum(c.isalpha() for c in text), MOST_LETTERS) / MOST_LETTERS for text in completions]


def exact(args: argparse.Namespace, work: Path) -> None:
    """One-token answers: train, then print exact KL and reward beside best-of-n's and the optimum's."""
    model = Path(args.model).resolve()
    prompts = work / "prompt.jsonl"
    prompts.write_text(json.dumps({"prompt": args.prompt}) + "\n")
    sampling = ["--max-new-tokens", 1, "--temperature", 1.0, "--template", "none", "--schedule", "linear"]
    outputs = {}
    for kl_coef in args.kl_coefs:
        for seed in args.seeds:
            output = outputs[kl_coef, seed] = work / f"exact-{kl_coef:g}-{seed}"
            start = ("-m", model, "-r", f"{Path(__file__).stem}:letters", prompts, *sampling, "--seed", seed)
            line = ("ppo-run", "train", "-q", *start, *recipe(args, kl_coef), "-o", output)
            if not (output / "artifact.json").exists():
                call(*line, cwd=Path(__file__).resolve().parent)
    reference, rewards = distribution(str(model), args.prompt)
    print(f"prompt {args.prompt!r}, reward of the reference {reference @ rewards:.4f}\n")
    columns = ("β", "seed", "KL", "reward", "best-of-n there", "optimum there", "gap", "optimum of β")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    gaps = []
    for (kl_coef, seed), output in outputs.items():
        policy, _ = distribution(str(output), args.prompt)
        kl, reward = point(policy, reference, rewards)
        bound = at_kl(kl, lambda n: best_of(reference, rewards, 1 + n), reference, rewards)
        best = at_kl(kl, lambda x: tilted(reference, rewards, x), reference, rewards)
        goal = point(tilted(reference, rewards, 1 / kl_coef), reference, rewards)
        gaps.append(reward - bound)
        cells = f"{kl:.4f} | {reward:.4f} | {bound:.4f} | {best:.4f} | {gaps[-1]:+.4f}"
        print(f"| {kl_coef:g} | {seed} | {cells} | {goal[1]:.4f} at {goal[0]:.4f} |")
    if len(gaps) > 1:
        print(
            f"\nabove best-of-n: mean {statistics.mean(gaps):+.4f}, from {min(gaps):+.4f} to {max(gaps):+.4f}"
        )


def distribution(model: str, prompt: str) -> tuple[Floats, Floats]:
    """Probabilities ``(V,)`` of the first token of an answer, and each token's reward ``(V,)``."""
    import torch

    from tuneutils.shared.models import load_model

    loaded = load_model(model, device="cpu", dtype="float32")
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits[0, -1].double()
    decode = loaded.tokenizer.decode
    texts = [decode([i], skip_special_tokens=True) for i in range(len(logits))]
    return logits.softmax(-1).numpy(), np.array(letters([], texts))


def point(policy: Floats, reference: Floats, rewards: Floats) -> tuple[float, float]:
    """KL from the reference in nats, and expected reward."""
    there = policy > 0
    kl = policy[there] @ np.log(policy[there] / reference[there])
    return float(kl), float(policy @ rewards)


def tilted(reference: Floats, rewards: Floats, inverse: float) -> Floats:
    """``π_ref · exp(r · inverse) / Z``, the optimum at β = 1 / inverse (Rafailov et al. 2023, equation 4)."""
    made: Floats = reference * np.exp((rewards - rewards.max()) * inverse)
    return made / made.sum()


def best_of(reference: Floats, rewards: Floats, n: float) -> Floats:
    """The distribution of the best of ``n`` answers; answers of one reward share as in the reference."""
    levels, at = np.unique(rewards, return_inverse=True)
    mass = np.bincount(at, reference)
    upto = np.minimum(np.cumsum(mass), 1.0)
    share = np.diff(upto**n, prepend=0.0) / np.where(mass > 0, mass, 1.0)
    assert len(levels) == len(share)
    made: Floats = reference * share[at]
    return made / made.sum()


def at_kl(kl: float, family: Callable[[float], Floats], reference: Floats, rewards: Floats) -> float:
    """The reward of the member of a family, KL rising from 0 with its parameter, that has this KL."""
    low, high = 0.0, 1.0
    while point(family(high), reference, rewards)[0] < kl and high < 1e6:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if point(family(middle), reference, rewards)[0] < kl else (low, middle)
    return point(family(low), reference, rewards)[1]


def sampled(args: argparse.Namespace, work: Path) -> None:
    """Longer answers: train, then measure on held-out prompts by sampling."""
    if not args.prompts or not args.heldout:
        sys.exit("the sampled setting needs --prompts and --heldout")
    sampling = ["--max-new-tokens", args.max_new_tokens, "--temperature", 1.0]
    policies = []
    for kl_coef in args.kl_coefs:
        for seed in args.seeds:
            output = work / f"kl-{kl_coef:g}-{seed}"
            policies.append(f"beta-{kl_coef:g}-seed-{seed}={output}")
            start = ("-m", args.model, "-r", args.reward, args.prompts, *sampling, "--seed", seed)
            call("ppo-run", "train", *start, *recipe(args, kl_coef), "-o", output)
    asked = ("--prompts", args.heldout, "-r", args.reward, "--limit", args.limit, "--best-of", args.best_of)
    call("ppo-run", "compare", f"sft={args.model}", *policies, *asked, *sampling, "-o", work / "report")
    show(json.loads((work / "report" / "report.json").read_text(encoding="utf-8")))


def show(report: dict[str, Any]) -> None:
    """The table, and each policy's distance from best-of-n at its KL."""
    curve = report["best_of_n"]
    print(f"{report['prompts']} prompts\n\n| policy | KL | reward | above best-of-n |\n|---|---|---|---|")
    for row in curve:
        print(f"| best of {row['n']} | {row['kl']:.3f} | {spread(row['reward'])} | |")
    known = [r["kl"] for r in curve], [r["reward"]["value"] for r in curve]
    for row in report["policies"][1:]:
        above = row["reward"]["value"] - np.interp(row["kl"]["value"], *known)
        print(f"| {row['label']} | {spread(row['kl'])} | {spread(row['reward'])} | {above:+.3f} |")


def spread(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    main()
