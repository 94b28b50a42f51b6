"""PPO updates a second and peak memory, beside TRL 1.12.0's PPOTrainer (its last), in one run.

    python -m venv peer && peer/bin/pip install trl==1.12.0 torch transformers peft datasets
    python benchmarks/ppo_step.py --model artifacts/base --prompts prompts.jsonl --peer-python peer/bin/python

Each task is a process of its own with the same model, prompts, response length, batch, epochs, micro-batch:
policy, reward model and value model of one size, the value model from the reward model. The first update
of each is a warm-up. ``rollout``, ``scoring`` and ``update`` are seconds of one update.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = ("ppo-run:lora", "trl:lora", "ppo-run:full", "trl:full")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with TRL 1.12.0")
    parser.add_argument("--task", help="only this one, in this process")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--work", help="where the reward model and outputs go")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.task:
        name, method = args.task.split(":")
        found = ours(args, method) if name == "ppo-run" else peer(args, method)
        found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"task": args.task, **found}))
        return
    args.work = args.work or tempfile.mkdtemp()
    make_reward_model(args)
    rows = [measured(args, task) for task in args.tasks]
    print("| task | samples/s | rollout s | scoring s | update s | peak GiB |\n|---|---|---|---|---|---|")
    for row in rows:
        parts = (f"{row[k]:.2f}" if k in row else "" for k in ("rollout_s", "scoring_s", "update_s"))
        peak = row["peak_rss_bytes"] / 2**30
        print(f"| {row['task']} | {row['samples_per_s']:.2f} | {' | '.join(parts)} | {peak:.2f} |")
    by_task = {row["task"]: row for row in rows}
    for method in ("lora", "full"):
        a, b = by_task.get(f"ppo-run:{method}"), by_task.get(f"trl:{method}")
        if a and b:
            speed, memory = (a[k] / b[k] for k in ("samples_per_s", "peak_rss_bytes"))
            print(f"{method}: {speed:.2f} times the samples/s, {memory:.2f} times the peak memory")


def measured(args: argparse.Namespace, task: str) -> dict[str, Any]:
    """Run one task in a process of its own."""
    python = args.peer_python if task.startswith("trl") else sys.executable
    line = [python, __file__, "--task", task]
    for name, value in vars(args).items():
        if name not in ("task", "tasks") and value is not None:
            line += [f"--{name.replace('_', '-')}", str(value)]
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "GOMP_SPINCOUNT": "0"}
    quiet = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(line, env={**os.environ, **threads, **quiet}, stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(row, file=sys.stderr)
    return row


def make_reward_model(args: argparse.Namespace) -> None:
    """The model's own trunk with a random head: what it says does not matter here."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    folder = Path(args.work) / "rm"
    AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)


def ours(args: argparse.Namespace, method: str) -> dict[str, float]:
    from tuneutils.tools.ppo_run.cli import main as ppo_run

    out = Path(args.work) / f"out-{method}"
    line = ["-q", "-m", args.model, "-r", f"{args.work}/rm", args.prompts, "-o", str(out), "--force"]
    line += ["--method", method, "--dtype", args.dtype, "--device", "cpu", "--updates", str(args.updates)]
    line += ["--batch-size", str(args.batch_size), "--micro-batch-size", str(args.micro_batch_size)]
    line += ["--ppo-epochs", str(args.epochs), "--max-new-tokens", str(args.response_length)]
    line += ["--checkpoint-every", "0", "--samples-every", "0"]
    try:
        ppo_run(line)
    except SystemExit as done:
        if done.code:
            raise
    log = Path(args.work) / ".work" / out.name / "run.jsonl"
    events = [json.loads(text) for text in log.read_text().splitlines()]
    timed = [e for e in events if e["event"] == "update"][-(args.updates - 1) :]
    made = {k: sum(e[k] for e in timed) / len(timed) for k in ("rollout_s", "scoring_s", "update_s")}
    return {"samples_per_s": args.batch_size / sum(made.values()), **made}


def peer(args: argparse.Namespace, method: str) -> dict[str, float]:
    """TRL with its own defaults, on the same token ids; its rollout and update are not timed apart."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text().splitlines()]
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for p in prompts
    ]
    policy = AutoModelForCausalLM.from_pretrained(args.model)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(f"{args.work}/rm", num_labels=1) for _ in range(2)
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.monotonic())

    config = PPOConfig(
        output_dir=f"{args.work}/trl",
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        local_rollout_forward_batch_size=args.micro_batch_size,
        num_ppo_epochs=args.epochs,
        num_mini_batches=1,
        total_episodes=args.batch_size * args.updates,
        response_length=args.response_length,
        missing_eos_penalty=1.0,
        stop_token="eos",
        num_sample_generations=0,
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None if method == "lora" else AutoModelForCausalLM.from_pretrained(args.model),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[: args.batch_size]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        if method == "lora"
        else None,
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    return {"samples_per_s": args.batch_size / seconds}


if __name__ == "__main__":
    main()
