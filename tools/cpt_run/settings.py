"""Transformers' training arguments and progress for a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuneutils.shared.command import Run
from tuneutils.shared.methods import learning_rate
from tuneutils.shared.models import Loaded
from tuneutils.tools.cpt_run.params import Params


def training_arguments(run: Run[Params], folder: Path, steps: int, loaded: Loaded, measures: bool) -> Any:
    """TrainingArguments for our parameters; the rate and the order of rows are the trainer's own."""
    import torch
    from transformers import TrainingArguments

    params = run.params
    use_cpu = loaded.device.type == "cpu"
    checkpointing = params.gradient_checkpointing
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        learning_rate=learning_rate(params),
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        bf16=loaded.dtype == torch.bfloat16,
        fp16=loaded.dtype == torch.float16,
        use_cpu=use_cpu,
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if measures and params.eval_every else "no",
        eval_steps=params.eval_every or None,
        save_strategy="steps" if params.checkpoint_every else "no",
        save_steps=params.checkpoint_every or 500,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not use_cpu,
        report_to=[],
        disable_tqdm=True,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if use_cpu and _several() else None,
    )


def _several() -> bool:
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def progress(run: Run[Params], log_event: Callable[..., None]) -> Any:
    """A callback: progress for people, and every logged step as a line of the run log."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        bar: Any = None

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.bar is None:
                self.bar = run.progress(state.max_steps, "training", "steps")
                self.bar.update(state.global_step)
                return
            last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), 0.0)
            self.bar.update(1, loss=f"{last:.3f}")

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            log_event(event="step", step=state.global_step, **(logs or {}))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.bar is not None:
                self.bar.__exit__()

    return Report()
