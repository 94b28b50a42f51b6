"""What the tools that tune a model by any method share: settings, progress, going on, and saving.

Importing this module loads no heavy library.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.methods import (
    MethodParams,
    apply_method,
    learning_rate,
    quantization,
    settle_adapter_config,
)
from tuneutils.shared.models import ModelRef, load_base, resolve


def world_size() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def base_to_tune(given: str) -> ModelRef:
    """The model that a name stands for, if it can be tuned.

    Raises:
        ToolError: (2) it is an adapter, or what ``models.resolve`` raises.
    """
    base = resolve(given)
    if base.kind == "adapter":
        raise ToolError(
            f"{given}: is an adapter; merge it into its base first (adapter-merge)", code=ExitCode.USAGE
        )
    return base


def prepare_model(
    params: MethodParams,
    base: ModelRef,
    tokenizer: Any,
    init_text: str,
    dtype: Any,
    where: Any,
    *,
    trust_remote_code: bool = False,
    under: str | None = None,
) -> Any:
    """The base in the precision that the method wants, with the method applied.

    Full fine-tuning keeps float32 master weights and multiplies in the precision asked for.

    Args:
        under: a bottleneck adapter on which a new one is stacked.
    """
    import torch

    stored = torch.float32 if params.method == "full" else dtype
    model = load_base(base, where, stored, quantization(params), trust_remote_code)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return apply_method(model, tokenizer, params, init_text, under)


def trainer_config(
    run: Run[Any], folder: Path, dtype: Any, *, steps: int, use_cpu: bool, **changes: Any
) -> Any:
    """TRL's SFTConfig for the options that these tools have in common; its data preparation is off.

    Args:
        folder: of the checkpoints.
        steps: optimizer steps of the run.
        changes: fields of the config that differ from what is set here.
    """
    import torch
    from trl import SFTConfig

    params = run.params
    every = params.checkpoint_every
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": params.batch_size,
        "per_device_eval_batch_size": params.batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation,
        "learning_rate": learning_rate(params),
        "weight_decay": params.weight_decay,
        "max_grad_norm": params.max_grad_norm,
        "gradient_checkpointing": params.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if params.gradient_checkpointing else None,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": use_cpu,
        "seed": run.seed,
        "data_seed": run.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "steps" if every else "no",
        "save_steps": every or 500,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not use_cpu,
        "report_to": [],
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if use_cpu and world_size() > 1 else None,
    }
    return SFTConfig(**{**values, **changes})


def progress_report(run: Run[Any], art: Artifact) -> Any:
    """A trainer's callback: progress for people, and every logged step as a line of the run log."""
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
            log_event(run, art, event="step", step=state.global_step, **(logs or {}))
            if logs and "eval_loss" in logs:
                run.log.info("step %d: held-out loss %.4f", state.global_step, logs["eval_loss"])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.bar is not None:
                self.bar.__exit__()

    return Report()


def resume_point(run: Run[Any], checkpoints: Path, art: Artifact) -> Path | None:
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


def save_tuned(art: Artifact, trainer: Any, tokenizer: Any, **adapter_keywords: Any) -> None:
    """The trained weights in their ecosystem's format, without anything that varies between runs.

    Args:
        adapter_keywords: of PEFT's ``save_pretrained``.
    """
    params = art.run.params
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not is_main():
        return
    model.config.use_cache = True
    if params.method == "full":
        model.save_pretrained(art.dir, state_dict=state)
    else:
        config = model.peft_config["default"]
        base = resolve(params.model)
        config.base_model_name_or_path, config.revision = base.path, base.revision
        kwargs: dict[str, Any] = {"state_dict": state} if state is not None else {}
        model.save_pretrained(art.dir, save_embedding_layers=False, **kwargs, **adapter_keywords)
        settle_adapter_config(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(art.dir)
    with open(art.dir / "log.jsonl", "w", encoding="utf-8") as stream:
        for line in trainer.log_lines():
            stream.write(json.dumps(line) + "\n")


def peaks(device_type: str) -> dict[str, int]:
    """Peak memory of this process, in bytes; for the run log alone."""
    import resource

    import torch

    made = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device_type == "cuda":
        made["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return made


def log_event(run: Run[Any], art: Artifact, **event: Any) -> None:
    """A line of the run log: what depends on clock and machine belongs here, not in the artifact."""
    if not is_main():
        return
    art.work.mkdir(parents=True, exist_ok=True)
    with open(art.work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")
