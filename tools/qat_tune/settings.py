"""The trainer's settings, progress, and where to go on from."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, library_versions
from tuneutils.shared.checkpoints import last_checkpoint, run_identity
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device
from tuneutils.tools.qat_tune.params import Params

LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
SCALE_RATE = 1e-3


def learning_rate(params: Params) -> float:
    """The rate given, or the method's own."""
    return LEARNING_RATES[params.method] if params.learning_rate is None else params.learning_rate


def scale_rate(params: Params) -> float:
    return SCALE_RATE if params.scale_learning_rate is None else params.scale_learning_rate


def training_config(run: Run[Params], folder: Path, dtype: Any, examples: int, where: Any) -> Any:
    """TRL's SFTConfig; its data preparation is off, since examples come encoded."""
    import torch
    from trl import SFTConfig

    params = run.params
    per_epoch = math.ceil(examples / (params.batch_size * params.gradient_accumulation))
    steps = params.max_steps or max(1, math.ceil(per_epoch * params.epochs))
    use_cpu = where.type == "cpu"
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        learning_rate=learning_rate(params),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(params.schedule, params.schedule),
        warmup_steps=int(params.warmup * steps),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=False,
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
    )


def progress_callback(run: Run[Params], art: Artifact) -> Any:
    """Progress for people, and every logged step as a line of the run log."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        bar: Any = None

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.bar is None:
                self.bar = run.progress(state.max_steps, "training", "steps")
                self.bar.update(state.global_step)
                return
            last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), 0.0)
            self.bar.update(1, loss=f"{last:.4f}")

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            log_event(run, art, event="step", step=state.global_step, **(logs or {}))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.bar is not None:
                self.bar.__exit__()

    return Report()


def resume_point(run: Run[Params], checkpoints: Path, art: Artifact) -> Path | None:
    """The checkpoint to go on from: only one of a run with the same inputs and parameters."""
    values = {k: v["value"] for k, v in run.manifest_params().items()}
    inputs = [(i.role, i.sha256) for i in art.inputs]
    identity = run_identity(values, run.seed, inputs, library_versions(), resolve_device(run.device).type)
    found = last_checkpoint(checkpoints, identity)
    if found is not None:
        run.log.info("going on from step %s", found.name.split("-")[1])
    return found


def log_event(run: Run[Params], art: Artifact, **event: Any) -> None:
    """A line of the run log: what depends on clock and machine belongs here, not in the artifact."""
    art.work.mkdir(parents=True, exist_ok=True)
    with open(art.work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")
