"""A DPO step (forward, backward) of pref-tune beside TRL's DPOTrainer on the same pairs, in turn.

    python benchmarks/pref_step.py --model artifacts/base --records artifacts/rlhf/preferences/reward.jsonl

LoRA of rank 16 on all linear layers, float32, one batch of pairs. TRL's reference is the adapter switched off
in every step, as it is by default; its pass alone is timed as for ours. CPU seconds of the
process are shown beside wall time, since other work on the machine stretches that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig

from tuneutils.shared.adapters.fused_lora import fused
from tuneutils.shared.models import load_model
from tuneutils.shared.records import read
from tuneutils.shared.texts import Text, encode_text
from tuneutils.tools.pref_tune.batches import Reader
from tuneutils.tools.pref_tune.losses import Objective
from tuneutils.tools.pref_tune.reference import of_pairs
from tuneutils.tools.pref_tune.trainer import Lesson, PreferenceTrainer

Pairs = list[tuple[Text, Text]]
Step = Callable[[], Any]
CPU = torch.device("cpu")


def with_adapter(model: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(model, config)


def common(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None,
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip


def ours(path: str, pairs: Pairs, folder: str, packs: bool) -> tuple[Step, Step]:
    """A step, and the reference's pass over the batch."""
    loaded = load_model(path, device="cpu", dtype="float32")
    pad = loaded.pad_id

    def reference() -> Any:
        with fused(loaded.model, CPU, causal_masks=True):
            return of_pairs(Reader(loaded.model), pairs, pad, len(pairs), packs, "cpu")

    lesson = Lesson(
        Objective("dpo", 0.1),
        pad,
        reference(),
        pairs=pairs,
        targets=[1.0] * len(pairs),
        margins=[0.0] * len(pairs),
        packs=packs,
    )
    model = with_adapter(loaded.model.requires_grad_(False))
    args = SFTConfig(
        **common(folder), dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False
    )
    trainer = PreferenceTrainer(model, args, loaded.tokenizer, lesson)
    batch = lesson([{"index": i} for i in range(len(pairs))])
    model.train()

    def step() -> Any:
        with fused(model, CPU, causal_masks=True):
            trainer.compute_loss(model, batch).backward()

    def pass_of_reference() -> Any:
        with model.disable_adapter(), fused(model, CPU, causal_masks=True):
            of_pairs(Reader(model), pairs, pad, len(pairs), packs, "cpu")

    return step, pass_of_reference


def trl(path: str, pairs: Pairs, folder: str) -> tuple[Step, Step]:
    loaded = load_model(path, device="cpu", dtype="float32")
    model = with_adapter(loaded.model.requires_grad_(False))
    rows = [
        {"prompt_ids": c.ids[: c.prompt], "chosen_ids": c.ids[c.prompt :], "rejected_ids": r.ids[r.prompt :]}
        for c, r in pairs
    ]
    plain = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**common(folder)),
        processing_class=loaded.tokenizer,
        train_dataset=plain,
    )
    batch = trainer.data_collator(rows)
    model.train()
    return (
        lambda: trainer.compute_loss(model, batch).backward(),
        lambda: trainer.compute_ref_log_probs(model, batch),
    )


def timed(step: Step) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="artifacts/base")
    parser.add_argument("--records", default="artifacts/rlhf/preferences/reward.jsonl")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = load_model(args.model, device="cpu", dtype="float32").tokenizer
    pairs: Pairs = [
        (encode_text(r["prompt"], r["chosen"], tokenizer), encode_text(r["prompt"], r["rejected"], tokenizer))
        for r in read(args.records)[: args.batch_size]
    ]
    with tempfile.TemporaryDirectory() as folder:
        engines = {
            "pref-tune": ours(args.model, pairs, folder, True),
            "pref-tune, rows apart": ours(args.model, pairs, folder, False),
            "TRL's DPOTrainer": trl(args.model, pairs, folder),
        }
        times: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in engines}
        for repeat in range(args.repeats + 1):
            for name, (step, reference) in engines.items():
                made = [timed(step), timed(reference)]
                if repeat:  # the first warms up
                    times[name].append(made)
    tokens = sum(len(t.ids) for pair in pairs for t in pair)
    print(f"{len(pairs)} pairs, {tokens} tokens, medians of {args.repeats}")
    print("| engine | step, CPU s | step, s | reference's pass, CPU s |\n|---|---|---|---|")
    for name, runs in times.items():
        median = [statistics.median(values) for values in zip(*([*r[0], *r[1]] for r in runs), strict=True)]
        print(f"| {name} | {median[0]:.2f} | {median[1]:.2f} | {median[2]:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(times, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
