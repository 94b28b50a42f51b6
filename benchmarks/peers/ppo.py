"""PPO by TRL 1.12.0 and ms-swift 4.6.0 for ``benchmarks/ppo_step.py``, run by their own interpreters."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

#: Of TRL: the precision of what is frozen (always trained in float32), rows of a forward pass, of a rollout.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"frozen": "float32", "micro": 8, "rollout": 8},
    "rollout-32": {"frozen": "float32", "micro": 8, "rollout": 32},
    "micro-4": {"frozen": "float32", "micro": 4, "rollout": 32},
    "value-adapter": {"frozen": "float32", "micro": 8, "rollout": 32, "value": "lora"},
    "value-adapter+micro-4": {"frozen": "float32", "micro": 4, "rollout": 32, "value": "lora"},
    "bf16-frozen": {"frozen": "bfloat16", "micro": 8, "rollout": 32},
    "bf16-frozen+micro-16": {"frozen": "bfloat16", "micro": 16, "rollout": 32},
    "bf16-frozen+value-adapter": {"frozen": "bfloat16", "micro": 8, "rollout": 32, "value": "lora"},
}
PHASES = ("rollout_s", "scoring_s", "update_s")
CPU_PHASES = ("rollout_cpu_s", "scoring_cpu_s", "update_cpu_s")


def status_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


class Memory:
    """Resident size when all models are loaded, and the peaks before and after."""

    def loaded(self, *models: Any) -> None:
        import torch

        for model in models:
            for tensor in model.state_dict().values():
                tensor.view(torch.uint8).sum()
        self.before = status_bytes("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        self.base = status_bytes("VmRSS")

    def found(self) -> dict[str, float]:
        peak = status_bytes("VmHWM")
        return {"peak_bytes": max(peak, self.before), "growth_bytes": peak - self.base}


def rates(args: argparse.Namespace, seconds: float, cpu_s: float) -> dict[str, float]:
    return {"samples_per_s": args.batch_size / seconds, "samples_per_cpu_s": args.batch_size / cpu_s}


def peer(args: argparse.Namespace, method: str) -> dict[str, float]:
    """TRL on the same token ids, with one of the settings and its defaults otherwise."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    setting = TRL_SETTINGS[args.settings]
    micro = min(setting["micro"], args.batch_size)
    frozen, wide = getattr(torch, setting["frozen"]), torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text().splitlines()]
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for p in prompts
    ]
    adapter: dict[str, Any] = {"r": 16, "lora_alpha": 32}
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def scorer(dtype: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            f"{args.work}/rm", num_labels=1, dtype=dtype
        )

    lora = method == "lora"
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=frozen if lora else wide)
    reference = None if lora else AutoModelForCausalLM.from_pretrained(args.model, dtype=frozen)
    reward = scorer(frozen)
    if setting.get("value") == "lora":
        config = LoraConfig(**adapter, target_modules=linear, modules_to_save=["score"])
        value = get_peft_model(scorer(frozen), config)
    else:
        value = scorer(wide)
    memory, phases = Memory(), Phases()
    memory.loaded(*(m for m in (policy, reference, reward, value) if m is not None))
    phases.watch(ppo_trainer)
    config = PPOConfig(
        output_dir=f"{args.work}/trl",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=args.batch_size // micro,
        local_rollout_forward_batch_size=min(setting["rollout"], args.batch_size),
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
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids[: args.batch_size]}),
        peft_config=LoraConfig(**adapter, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    return phases.found(args) | memory.found()


class Phases:
    """When the phases of TRL's loop ended, by the clock and in processor time."""

    def __init__(self) -> None:
        self.ends: list[tuple[str, float, float]] = []

    def watch(self, ppo_trainer: Any) -> None:
        """From here on, in TRL's module."""
        from transformers.trainer_callback import CallbackHandler

        self._watch(CallbackHandler, "on_train_begin", "start")
        self._watch(ppo_trainer, "batch_generation", "rollout_s")
        self._watch(ppo_trainer, "masked_whiten", "scoring_s")  # the last of scoring
        self._watch(CallbackHandler, "on_step_end", "update_s")

    def _watch(self, where: Any, function: str, phase: str) -> None:
        inner = getattr(where, function)

        def call(*given: Any, **named: Any) -> Any:
            made = inner(*given, **named)
            self.ends.append((phase, time.monotonic(), time.process_time()))
            return made

        setattr(where, function, call)

    def found(self, args: argparse.Namespace) -> dict[str, float]:
        """Rates and means of all updates but the first, a warm-up, or of the only one."""
        ends = [i for i, (phase, _, _) in enumerate(self.ends) if phase in ("start", "update_s")]
        count = max(1, len(ends) - 2)
        timed = self.ends[ends[-1 - count] :]
        made = dict.fromkeys((*PHASES, *CPU_PHASES), 0.0)
        for before, after in itertools.pairwise(timed):
            made[after[0]] += (after[1] - before[1]) / count
            made[after[0].replace("_s", "_cpu_s")] += (after[2] - before[2]) / count
        cpu_s = (timed[-1][2] - timed[0][2]) / count
        return rates(args, sum(made[k] for k in PHASES), cpu_s) | made


def swift(args: argparse.Namespace, method: str) -> dict[str, float]:
    """``swift rlhf --rlhf_type ppo`` on the same prompts."""
    from swift import rlhf_main
    from swift.rlhf_trainers import ppo_trainer as swift_trainer
    from trl.experimental.ppo import ppo_trainer

    data = Path(args.work) / "swift.jsonl"
    prompts = [json.loads(line)["prompt"] for line in Path(args.prompts).read_text().splitlines()]
    lines = [
        {"messages": [{"role": "user", "content": p}]} for p in prompts[: args.batch_size * args.updates]
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    memory, phases, micro = Memory(), Phases(), min(8, args.batch_size)
    init = swift_trainer.PPOTrainer.__init__

    def watched(self: Any, model: Any, ref_model: Any, *given: Any, **named: Any) -> None:
        models = [model, ref_model, named["reward_model"], named["value_model"]]
        models = [m for many in models for m in (many if isinstance(many, list) else [many])]
        memory.loaded(*(m for m in models if m is not None))
        init(self, model, ref_model, *given, **named)

    swift_trainer.PPOTrainer.__init__ = watched
    phases.watch(ppo_trainer)
    options = {
        "rlhf_type": "ppo",
        "model": args.model,
        "model_type": "llama",
        "template": "chatml",
        "reward_model": f"{args.work}/rm",
        "reward_model_type": "llama",
        "reward_template": "chatml",
        "dataset": data,
        "dataset_shuffle": False,
        "torch_dtype": "float32",
        "bf16": args.dtype == "bfloat16",
        "fp16": False,
        "tuner_type": method,
        "lora_rank": 16,
        "lora_alpha": 32,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": args.batch_size // micro,
        "local_rollout_forward_batch_size": args.batch_size,
        "num_ppo_epochs": args.epochs,
        "num_mini_batches": 1,
        "num_train_epochs": 1,
        "response_length": args.response_length,
        "max_length": 512,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "output_dir": f"{args.work}/swift",
    }
    rlhf_main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return phases.found(args) | memory.found()
