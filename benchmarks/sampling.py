"""Tokens per second of our batched generation against transformers' generate, on the same prompts.

    python benchmarks/sampling.py --model artifacts/base --out sampling.json

Greedy, so that both write the same tokens (the share that agrees is printed). Completions end at the model's
own end-of-turn token, so their lengths spread; transformers gets batches sorted by length, left-padded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tuneutils.shared.device  # noqa: F401  sets the thread policy before torch loads

import torch  # isort: skip
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # isort: skip

from tuneutils.shared.sample import Sampling, generate  # isort: skip

QUESTIONS = [
    "What is the capital of France? Answer in one word.",
    "Name three colours.",
    "Explain how plants turn sunlight into sugar.",
    "Is water wet? Answer yes or no.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What is 7 times 8?",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "List the planets of the solar system.",
    "Translate 'good morning' into Spanish.",
    "Summarise the plot of Romeo and Juliet in one sentence.",
    "What does a compiler do?",
    "Give one synonym of 'quick'.",
    "Describe the water cycle step by step.",
    "How many legs has a spider?",
    "Write a polite e-mail that asks a colleague to move a meeting to Thursday.",
]


def with_transformers(
    model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace, stop: int, pad: int
) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), args.batch_size):
        chosen = order[start : start + args.batch_size]
        width = max(len(prompts[index]) for index in chosen)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=pad,
        )
        for index, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
            end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
            completions[index] = tokens[:end]
    return completions


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    completions = run()
    return time.perf_counter() - start, completions


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="artifacts/base", help="a model folder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="a JSON file for the result")
    args = parser.parse_args()
    if not Path(args.model).is_dir():
        sys.exit(f"{args.model}: no such folder; make it with 'dvc repro', or name one with --model")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device).eval()
    stop = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=0, stop_token_ids=(stop,))

    def ours() -> list[list[int]]:
        completions = generate(model, prompts, sampling, batch_size=args.batch_size, pad_token_id=pad)
        return [completion.token_ids for completion in completions]

    def theirs() -> list[list[int]]:
        return with_transformers(model, prompts, args, stop, pad)

    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    agreeing = 0.0
    lengths: list[int] = []
    for _ in range(args.repeats):
        results = {"ours": timed(ours), "transformers": timed(theirs)}
        for name, (seconds, completions) in results.items():
            rates[name].append(sum(map(len, completions)) / seconds)
        a, b = results["ours"][1], results["transformers"][1]
        agreeing = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
        lengths = sorted(map(len, a))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "model")}
    row = {
        **settings,
        "threads": torch.get_num_threads(),
        "completion_lengths": lengths,
        "completions_that_agree": agreeing,
        "tokens_per_s": medians["ours"],
        "transformers_tokens_per_s": medians["transformers"],
        "ratio": medians["ours"] / medians["transformers"],
    }
    for key, value in row.items():
        print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}")
    if args.out:
        with open(args.out, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
