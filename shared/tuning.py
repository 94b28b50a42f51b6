"""What the tools that train a model share: settings, progress, going on, and saving.

Importing this module loads no heavy library.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.artifact import Artifact, log_event
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.methods import MethodParams, quantization, settle_adapter_config
from tuneutils.shared.models import ModelRef, load_base, parameter_counts, resolve
from tuneutils.shared.processes import is_main, world_size


def hush_others(run: Run[Any]) -> None:
    """Of several processes let only the first one speak."""
    if not is_main():
        run.quiet = True
        run.log.setLevel("ERROR")


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


def stored_dtype(method: str, dtype: Any) -> Any:
    """How the base is stored: full fine-tuning keeps float32 master weights and multiplies in ``dtype``."""
    import torch

    return torch.float32 if method == "full" else dtype


def load_frozen(base: ModelRef, where: Any, dtype: Any, scheme: str | None, trust_remote_code: bool) -> Any:
    """A base without gradients and cache.

    Args:
        scheme: of 4-bit storage, if any.
    """
    model = load_base(base, where, dtype, scheme, trust_remote_code)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def log_parameters(run: Run[Any], model: Any, what: str, dtype: Any, where: Any) -> dict[str, int]:
    """Count a model's parameters and say how many are trained, by what, in which precision and where."""
    counts = parameter_counts(model)
    run.log.info(
        "%s: %d of %d parameters trainable (%.3f %%), %s on %s",
        what,
        counts["trainable"],
        counts["total"],
        100 * counts["trainable"] / counts["total"],
        dtype_name(dtype),
        where,
    )
    return counts


def memory_estimate(
    params: MethodParams, config: Any, counts: dict[str, int], itemsize: int, tokens: int
) -> int:
    """Weights, gradients, Adam's two moments, and the activations that backward keeps, in bytes.

    Activations per token and layer: about 34 hidden-size values of two bytes with the feed-forward block at
    four times the hidden size (Korthikanti et al. 2022, equation 1, without the quadratic attention term,
    which memory-efficient attention does not keep); one value with gradient checkpointing.

    Args:
        config: of the model, with ``hidden_size`` and ``num_hidden_layers``.
        counts: ``total`` and ``trainable`` parameters.
        itemsize: bytes of a number in the precision that is computed in.
        tokens: of a micro-batch.
    """
    trainable = counts["trainable"]
    stored = 4.0 if params.method == "full" else (0.55 if quantization(params) else float(itemsize))
    weights = (counts["total"] - trainable) * stored + trainable * 4
    per_layer = config.hidden_size * (1 if params.gradient_checkpointing else 17) * itemsize
    activations = tokens * per_layer * config.num_hidden_layers
    chunk_of_logits = 2 * 32 * 2**20
    return int(weights + 3 * 4 * trainable + activations + chunk_of_logits)


def optimizer_steps(params: Any, examples: int) -> int:
    """Steps of a run: ``max_steps``, or ``epochs`` passes over the examples by all processes together."""
    per_epoch = math.ceil(examples / (params.batch_size * params.gradient_accumulation * world_size()))
    return params.max_steps or max(1, math.ceil(per_epoch * params.epochs))


def training_options(
    run: Run[Any], folder: Path, dtype: Any, *, steps: int, learning_rate: float, use_cpu: bool
) -> dict[str, Any]:
    """Fields of Transformers' TrainingArguments for the options that tools which train have in common.

    Args:
        folder: of the checkpoints.
        steps: optimizer steps of the run.
        learning_rate: its peak.
    """
    import torch

    params = run.params
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": params.batch_size,
        "per_device_eval_batch_size": params.batch_size,
        "gradient_accumulation_steps": params.gradient_accumulation,
        "learning_rate": learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(params.schedule, params.schedule),
        "warmup_steps": int(params.warmup * steps),
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
        "save_strategy": "steps" if params.checkpoint_every else "no",
        "save_steps": params.checkpoint_every or 500,
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not use_cpu,
        "report_to": [],
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if use_cpu and world_size() > 1 else None,
    }


def trainer_config(
    run: Run[Any],
    folder: Path,
    dtype: Any,
    *,
    steps: int,
    learning_rate: float,
    use_cpu: bool,
    **changes: Any,
) -> Any:
    """TRL's SFTConfig by `training_options`; its data preparation is off, since examples come encoded.

    Args:
        changes: fields of the config that differ from those.
    """
    from trl import SFTConfig

    options = training_options(run, folder, dtype, steps=steps, learning_rate=learning_rate, use_cpu=use_cpu)
    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(**{**options, **own, **changes})


def progress_report(run: Run[Any], shown: Sequence[str] = ("loss",)) -> Any:
    """A trainer's callback: progress for people, and every logged step as a line of the run log.

    Args:
        shown: what of a logged step stands beside the progress.
    """
    from transformers import TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        bar: Any = None

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.bar is None:
                self.bar = run.progress(state.max_steps, "training", "steps")
                self.bar.update(state.global_step)
                return
            last: dict[str, float] = next((e for e in reversed(state.log_history) if "loss" in e), {})
            self.bar.update(1, **{name: f"{last[name]:.3f}" for name in shown if name in last})

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            log_event(run, event="step", step=state.global_step, **(logs or {}))
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
    write_log(art, trainer.log_lines())


def write_log(art: Artifact, lines: Sequence[dict[str, Any]]) -> None:
    """A training log as ``log.jsonl``."""
    with open(art.dir / "log.jsonl", "w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line) + "\n")


def _peaks(device_type: str) -> dict[str, int]:
    """Peak memory of this process, in bytes; for the run log alone."""
    import resource

    import torch

    made = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device_type == "cuda":
        made["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return made


def log_done(run: Run[Any], started: float, resume: Path | None, where: Any, **facts: Any) -> None:
    """Tell the run log that training is done, what it took, and where.

    Args:
        started: by the monotonic clock.
        resume: the checkpoint that it went on from.
    """
    log_event(
        run,
        event="done",
        train_s=time.monotonic() - started,
        resumed=bool(resume),
        device=str(where),
        **_peaks(where.type),
        **facts,
    )
