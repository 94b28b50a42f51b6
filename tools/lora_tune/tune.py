"""Fine-tuning from top to bottom: records and a base model in, an adapter or a model out."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.methods import (
    apply_method,
    learning_rate,
    quantization,
    settle_adapter_config,
)
from tuneutils.shared.models import (
    ModelRef,
    context_length,
    load_base,
    load_tokenizer,
    model_input,
    parameter_counts,
    resolve,
)
from tuneutils.shared.supervise import Encoded, check_eos
from tuneutils.tools.lora_tune.examples import (
    Examples,
    encode_all,
    is_main,
    open_source,
    print_labels,
    world_size,
)
from tuneutils.tools.lora_tune.params import Params
from tuneutils.tools.lora_tune.plan import check_options


def tune(run: Run[Params]) -> dict[str, Any]:
    """Run ``lora-tune``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    if not is_main():
        run.quiet = True
        run.log.setLevel("ERROR")
    base = check_options(params)
    source = open_source(run, run.inputs, "records")
    heldout = open_source(run, [params.heldout], "heldout") if params.heldout else None
    inputs = [model_input(params.model), *source.inputs, *(heldout.inputs if heldout else [])]
    tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
    context = _context(base, params)
    if params.show_labels:
        return print_labels(run, encode_all(run, source, tokenizer, context), tokenizer)
    with run.artifact("model" if params.method == "full" else "adapter", inputs) as art:
        art.licence = inputs[0].licence
        examples = encode_all(run, source, tokenizer, context)
        check_eos(examples.encoded, tokenizer, examples.without_end)
        held = encode_all(run, heldout, tokenizer, context) if heldout else Examples([])
        run.log.info(
            "%d examples, %d tokens, %d learnt", len(examples.encoded), examples.tokens, examples.learnt
        )
        _train(run, art, base, tokenizer, examples, held)
    return {"output": run.output, "metrics": art.metrics}


def _context(base: ModelRef, params: Params) -> int | None:
    """Tokens that an example may have: the model's positions less those that virtual tokens take."""
    positions = context_length(base, trust_remote_code=params.trust_remote_code)
    taken = params.virtual_tokens if params.method in ("prefix", "p-tuning", "prompt") else 0
    return None if positions is None else positions - taken


def _train(
    run: Run[Params], art: Artifact, base: ModelRef, tokenizer: Any, examples: Examples, held: Examples
) -> None:
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, ResumableTrainer, StopOnNaN

    params = run.params
    seed_everything(run.seed)
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    model = _prepare(run, base, tokenizer, examples.encoded[0], dtype, where, art.work)
    counts = parameter_counts(model)
    run.log.info(
        "%s: %d of %d parameters trainable (%.3f %%), %s on %s",
        params.method,
        counts["trainable"],
        counts["total"],
        100 * counts["trainable"] / counts["total"],
        dtype_name(dtype),
        where,
    )
    checkpoints = art.work / "checkpoints"
    trainer = ResumableTrainer(
        model,
        _config(run, checkpoints, dtype, len(examples.encoded), bool(held.encoded), where.type == "cpu"),
        tokenizer,
        examples.encoded,
        held.encoded,
        lr_ratio=params.loraplus_ratio,
        callbacks=[MarkComplete(), StopOnNaN(), *_callbacks(run, art)],
    )
    with trainer.accelerator.main_process_first():
        resume = _resume_point(run, checkpoints, art)
    trainer.args.eval_on_start = bool(held.encoded) and resume is None
    started = time.monotonic()
    with fused(model, where) if not trainer.is_fsdp_enabled else nullcontext():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if held.encoded and not params.patience and not _evaluated(trainer.state):
            trainer.evaluate()
    _log_event(
        run,
        art,
        event="done",
        train_s=time.monotonic() - started,
        resumed=bool(resume),
        device=str(where),
        **_peaks(where.type),
    )
    _save(run, art, trainer, tokenizer)
    _record(art, trainer, counts, examples, held, dtype)


def _evaluated(state: Any) -> bool:
    """Whether the held-out loss of the last step is known."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


def _prepare(
    run: Run[Params], base: ModelRef, tokenizer: Any, first: Encoded, dtype: Any, where: Any, work: Path
) -> Any:
    """The base in the precision that the method wants, with the method applied."""
    import torch

    params = run.params
    # Full fine-tuning keeps float32 master weights and multiplies in the precision asked for.
    stored = torch.float32 if params.method == "full" else dtype
    model = load_base(base, where, stored, quantization(params), params.trust_remote_code)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    given = [i for i, label in zip(first.input_ids, first.labels, strict=True) if label < 0]
    text = params.init_text or tokenizer.decode(given or first.input_ids)
    model = apply_method(model, tokenizer, params, text)
    if params.pissa:
        _save_initial(model, work)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _config(run: Run[Params], folder: Path, dtype: Any, examples: int, heldout: bool, use_cpu: bool) -> Any:
    """TRL's SFTConfig for our parameters; its data preparation is off, since examples come encoded."""
    import math

    import torch
    from trl import SFTConfig

    params = run.params
    per_epoch = math.ceil(examples / (params.batch_size * params.gradient_accumulation * world_size()))
    steps = params.max_steps or max(1, math.ceil(per_epoch * params.epochs))
    evaluates = heldout and params.eval_every > 0
    # The best checkpoint can be kept only if each evaluation saves one.
    save_every = params.eval_every if params.patience else params.checkpoint_every
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=params.batch_size,
        per_device_eval_batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation,
        learning_rate=learning_rate(params),
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
        eval_strategy="steps" if evaluates else "no",
        eval_steps=params.eval_every or None,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        load_best_model_at_end=bool(params.patience),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
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


def _callbacks(run: Run[Params], art: Artifact) -> list[Any]:
    from transformers import EarlyStoppingCallback, TrainerCallback

    class Report(TrainerCallback):  # type: ignore[misc]
        """Progress for people, and every logged step as a line of the run log."""

        trainer: Any = None
        bar: Any = None

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.bar is None:
                self.bar = run.progress(state.max_steps, "training", "steps")
                self.bar.update(state.global_step)
                return
            last = next((e["loss"] for e in reversed(state.log_history) if "loss" in e), 0.0)
            self.bar.update(1, loss=f"{last:.3f}")

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            _log_event(run, art, event="step", step=state.global_step, **(logs or {}))
            if logs and "eval_loss" in logs:
                run.log.info("step %d: held-out loss %.4f", state.global_step, logs["eval_loss"])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.bar is not None:
                self.bar.__exit__()

    made: list[Any] = [Report()]
    if run.params.patience:
        made.append(EarlyStoppingCallback(early_stopping_patience=run.params.patience))
    return made


def _resume_point(run: Run[Params], checkpoints: Path, art: Artifact) -> Path | None:
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


def _save_initial(model: Any, work: Path) -> None:
    """PiSSA moves part of the base into the adapter: keep its start, to save a plain LoRA at the end."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(work / "pissa_initial"))
    model.peft_config["default"].init_lora_weights = "pissa"


def _save(run: Run[Params], art: Artifact, trainer: Any, tokenizer: Any) -> None:
    """The trained weights in their ecosystem's format, without anything that varies between runs."""
    params = run.params
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
        if params.pissa:
            kwargs["path_initial_model_for_weight_conversion"] = str(art.work / "pissa_initial")
        model.save_pretrained(art.dir, save_embedding_layers=False, **kwargs)
        settle_adapter_config(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(art.dir)
    with open(art.dir / "log.jsonl", "w", encoding="utf-8") as stream:
        for line in trainer.log_lines():
            stream.write(json.dumps(line) + "\n")


def _record(
    art: Artifact, trainer: Any, counts: dict[str, int], examples: Examples, held: Examples, dtype: Any
) -> None:
    log = trainer.log_lines()
    evals = [e["eval_loss"] for e in log if "eval_loss" in e]
    art.extra["method"] = art.run.params.method
    art.extra["dtype"] = dtype_name(dtype)
    if (scheme := quantization(art.run.params)) is not None:
        art.extra["quantization"] = scheme
    art.metrics.update(
        trainable_parameters=counts["trainable"],
        total_parameters=counts["total"],
        examples=len(examples.encoded),
        tokens=examples.tokens,
        learnt_tokens=examples.learnt,
        truncated=examples.truncated,
        dropped=examples.dropped,
        steps=trainer.state.global_step,
        final_loss=next((e["loss"] for e in reversed(log) if "loss" in e), None),
    )
    if held.encoded:
        art.metrics.update(
            heldout_examples=len(held.encoded),
            heldout_tokens=held.learnt,
            heldout_loss_before=evals[0],
            heldout_loss=trainer.state.best_metric if art.run.params.patience else evals[-1],
        )


def _peaks(device_type: str) -> dict[str, int]:
    import resource

    import torch

    made = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device_type == "cuda":
        made["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return made


def _log_event(run: Run[Params], art: Artifact, **event: Any) -> None:
    """A line of the run log: what depends on clock and machine belongs here, not in the artifact."""
    if not is_main():
        return
    art.work.mkdir(parents=True, exist_ok=True)
    with open(art.work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")
