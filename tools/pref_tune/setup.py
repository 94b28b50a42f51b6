"""How a run is set up and told of: the trainer's configuration, precision, checkpoints, progress."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import resolve
from tuneutils.tools.pref_tune.params import TrainParams
from tuneutils.tools.pref_tune.plan import rate


def check_judge(params: Any, tokenizer: Any) -> None:
    """Refuse a reward model that reads prompts in another form than the policy.

    Raises:
        ToolError: exit 65, with the option to give.
    """
    if params.reward_model is None:
        return
    taught = (resolve(params.reward_model).manifest.get("reward_text") or {}).get("template")
    if taught is None:
        return

    def chats(name: str) -> bool:
        return name == "chat" or (name == "auto" and bool(tokenizer.chat_template))

    if chats(taught) != chats(params.template):
        raise ToolError(
            f"{params.reward_model}: was trained with --template {taught}, and the prompts here get "
            f"--template {params.template}; give --template {taught}, or train it with --template "
            f"{params.template}"
        )


def autocast(model: Any, where: Any, dtype: Any) -> Any:
    """Weights stored in float32 are multiplied in the precision asked for, as in training."""
    import torch

    stored = next(model.parameters()).dtype
    return torch.autocast(where.type, dtype=dtype, enabled=stored == torch.float32 and dtype != stored)


def without_dropout(model: Any) -> None:
    """Policy and reference must be one network at the start, and each side of a pair see the same."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def trainer_config(run: Run[TrainParams], folder: Path, dtype: Any, examples: int, use_cpu: bool) -> Any:
    """TRL's SFTConfig for our parameters; its data preparation is off, since examples come encoded."""
    import torch
    from trl import SFTConfig

    params = run.params
    per_epoch = math.ceil(examples / (params.batch_size * params.gradient_accumulation * world_size()))
    steps = params.max_steps or max(1, math.ceil(per_epoch * params.epochs))
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        learning_rate=rate(params),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(params.schedule, params.schedule),
        warmup_steps=int(params.warmup * steps),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=params.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if params.gradient_checkpointing else None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=use_cpu,
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="steps" if params.checkpoint_every else "no",
        save_steps=params.checkpoint_every or 500,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not use_cpu,
        report_to=[],
        disable_tqdm=True,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if use_cpu and world_size() > 1 else None,
    )


def reporter(run: Run[TrainParams], art: Artifact) -> Any:
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        """Progress for people, and every logged step as a line of the run log."""

        bar: Any = None

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.bar is None:
                self.bar = run.progress(state.max_steps, "training", "steps")
                self.bar.update(state.global_step)
                return
            last = next((e for e in reversed(state.log_history) if "loss" in e), None)
            names = ("loss", "margin", "accuracy")
            self.bar.update(1, **{k: f"{last[k]:.3f}" for k in names if k in last} if last else {})

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            log_event(run, art, event="step", step=state.global_step, **(logs or {}))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.bar is not None:
                self.bar.__exit__()

    return Report()


def resume_point(run: Run[TrainParams], checkpoints: Path, art: Artifact) -> Path | None:
    """The checkpoint to go on from: only one of a run with the same inputs and parameters."""
    from tuneutils.shared.artifact import library_versions
    from tuneutils.shared.checkpoints import last_checkpoint, run_identity

    values = {k: v["value"] for k, v in run.manifest_params().items()}
    inputs = [(i.role, i.sha256) for i in art.inputs]
    where = resolve_device(run.device).type
    identity = run_identity(values, run.seed, inputs, library_versions(), world_size(), where)
    found = last_checkpoint(checkpoints, identity)
    if found is not None:
        run.log.info("going on from step %s", found.name.split("-")[1])
    return found


def peaks(device_type: str) -> dict[str, int]:
    import resource

    import torch

    made = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device_type == "cuda":
        made["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return made


def log_event(run: Run[TrainParams], art: Artifact, **event: Any) -> None:
    """A line of the run log: what depends on clock and machine belongs here, not in the artifact."""
    if not is_main():
        return
    art.work.mkdir(parents=True, exist_ok=True)
    with open(art.work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return not int(os.environ.get("RANK", "0"))
