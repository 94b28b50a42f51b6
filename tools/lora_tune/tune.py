"""Fine-tuning from top to bottom: records and a base model in, an adapter or a model out."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.methods import quantization
from tuneutils.shared.models import ModelRef, context_length, load_tokenizer, model_input, parameter_counts
from tuneutils.shared.supervise import Encoded, check_eos
from tuneutils.shared.tuning import (
    is_main,
    log_event,
    peaks,
    prepare_model,
    progress_report,
    resume_point,
    save_tuned,
    trainer_config,
    world_size,
)
from tuneutils.tools.lora_tune.examples import Examples, encode_all, open_source, print_labels
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
        resume = resume_point(run, checkpoints, art)
    trainer.args.eval_on_start = bool(held.encoded) and resume is None
    started = time.monotonic()
    with fused(model, where) if not trainer.is_fsdp_enabled else nullcontext():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if held.encoded and not params.patience and not _evaluated(trainer.state):
            trainer.evaluate()
    log_event(
        run,
        art,
        event="done",
        train_s=time.monotonic() - started,
        resumed=bool(resume),
        device=str(where),
        **peaks(where.type),
    )
    start = {"path_initial_model_for_weight_conversion": str(art.work / "pissa_initial")}
    save_tuned(art, trainer, tokenizer, **(start if params.pissa else {}))
    _record(art, trainer, counts, examples, held, dtype)


def _evaluated(state: Any) -> bool:
    """Whether the held-out loss of the last step is known."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)


def _prepare(
    run: Run[Params], base: ModelRef, tokenizer: Any, first: Encoded, dtype: Any, where: Any, work: Path
) -> Any:
    """The base with the method applied; prefix and prompt start from what the first example is given."""
    params = run.params
    given = [i for i, label in zip(first.input_ids, first.labels, strict=True) if label < 0]
    text = params.init_text or tokenizer.decode(given or first.input_ids)
    trust = params.trust_remote_code
    model = prepare_model(params, base, tokenizer, text, dtype, where, trust_remote_code=trust)
    if params.pissa:
        _save_initial(model, work)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _config(run: Run[Params], folder: Path, dtype: Any, examples: int, heldout: bool, use_cpu: bool) -> Any:
    """The trainer's settings: how many steps, and when the held-out loss is taken."""
    params = run.params
    per_epoch = math.ceil(examples / (params.batch_size * params.gradient_accumulation * world_size()))
    steps = params.max_steps or max(1, math.ceil(per_epoch * params.epochs))
    evaluates = heldout and params.eval_every > 0
    # The best checkpoint can be kept only if each evaluation saves one.
    save_every = params.eval_every if params.patience else params.checkpoint_every
    return trainer_config(
        run,
        folder,
        dtype,
        steps=steps,
        use_cpu=use_cpu,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(params.schedule, params.schedule),
        warmup_steps=int(params.warmup * steps),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=params.eval_every or None,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        load_best_model_at_end=bool(params.patience),
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )


def _callbacks(run: Run[Params], art: Artifact) -> list[Any]:
    from transformers import EarlyStoppingCallback

    made: list[Any] = [progress_report(run, art)]
    if run.params.patience:
        made.append(EarlyStoppingCallback(early_stopping_patience=run.params.patience))
    return made


def _save_initial(model: Any, work: Path) -> None:
    """PiSSA moves part of the base into the adapter: keep its start, to save a plain LoRA at the end."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(work / "pissa_initial"))
    model.peft_config["default"].init_lora_weights = "pissa"


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
