"""Alignment from top to bottom: preferences and a model in, an adapter or a model with its report out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from tuneutils.shared.artifact import Artifact, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.methods import apply_method, quantization, settle_adapter_config
from tuneutils.shared.models import ModelRef, load_tokenizer, model_input
from tuneutils.shared.pairs import split
from tuneutils.shared.processes import is_main
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.tuning import (
    hush_others,
    load_frozen,
    log_done,
    log_parameters,
    optimizer_steps,
    progress_report,
    resume_point,
    stored_dtype,
    trainer_config,
    write_log,
)
from tuneutils.tools.pref_tune.examples import (
    Examples,
    as_singles,
    read,
    validate,
    validate_kto,
)
from tuneutils.tools.pref_tune.params import TrainParams
from tuneutils.tools.pref_tune.plan import check_options, rate, text_limit
from tuneutils.tools.pref_tune.setup import check_judge, without_dropout


@dataclass
class Fitted:
    """What training leaves: the aligned model, how it computes, its parameter counts, steps and log."""

    model: Any
    tokenizer: Any
    where: Any
    dtype: Any
    packs: bool
    counts: dict[str, int]
    steps: int
    log: list[dict[str, Any]]


def train(run: Run[TrainParams]) -> dict[str, Any]:
    """Run ``pref-tune train``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    from tuneutils.tools.pref_tune.report import headline, say, write_report

    params = run.params
    hush_others(run)
    base = check_options(params)
    check = validate_kto if params.loss == "kto" else validate
    source = open_source(run, run.inputs, "records", validate=check)
    heldout = open_source(run, [params.heldout], "heldout", validate=check) if params.heldout else None
    inputs = [model_input(params.model), *source.inputs, *(heldout.inputs if heldout else [])]
    if params.general:
        inputs.append(describe_input("general", params.general))
    if params.reward_model:
        inputs.append(model_input(params.reward_model, "reward-model"))
    with run.artifact("model" if params.method == "full" else "adapter", inputs) as art:
        art.licence = inputs[0].licence
        tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
        check_judge(params, tokenizer)
        learnt, held = _sides(run, art, source, heldout, tokenizer, text_limit(params, base))
        fitted = fit(run, art, base, tokenizer, learnt)
        if not is_main():
            return {}
        from tuneutils.tools.pref_tune.lesson import objective_of
        from tuneutils.tools.pref_tune.measures import measure

        report, answers = measure(run, base, fitted, objective_of(params), held)
        say(run, report)
        _save(run, art, base, fitted)
        write_report(art.dir, report, answers)
        _record(art, fitted, learnt, report, headline(report))
    return {"output": run.output, "metrics": art.metrics}


def _sides(
    run: Run[TrainParams],
    art: Artifact,
    source: Source,
    heldout: Source | None,
    tokenizer: Any,
    limit: int,
) -> tuple[Examples, Examples]:
    """What is learnt, and what is held out by its prompts."""
    params = run.params
    learnt = read(run, source, tokenizer, template=params.template, limit=limit)
    art.metrics.update(truncated=learnt.truncated, dropped=learnt.dropped, refused=learnt.refused)
    if heldout is not None:
        held = read(run, heldout, tokenizer, template=params.template, limit=limit)
    else:
        everything: list[Any] = [*learnt.pairs, *learnt.singles]
        _, kept = split(everything, params.heldout_share, run.seed)
        keys = {one.key for one in kept}
        held = Examples(
            [p for p in learnt.pairs if p.key in keys], [s for s in learnt.singles if s.key in keys]
        )
        learnt = replace(
            learnt,
            pairs=[p for p in learnt.pairs if p.key not in keys],
            singles=[s for s in learnt.singles if s.key not in keys],
        )
    known = {one.key for one in (*learnt.pairs, *learnt.singles)}
    if leaked := len({one.key for one in (*held.pairs, *held.singles)} & known):
        run.log.warning("%d held-out prompts are also learnt from; their numbers flatter", leaked)
    run.log.info(
        "%d pairs and %d labelled answers to learn from, %d and %d held out",
        len(learnt.pairs),
        len(learnt.singles),
        len(held.pairs),
        len(held.singles),
    )
    return learnt, held


def fit(run: Run[TrainParams], art: Artifact, base: ModelRef, tokenizer: Any, learnt: Examples) -> Fitted:
    """Train on the records; goes on from the last checkpoint of the same run."""

    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.pref_tune.lesson import prepare
    from tuneutils.tools.pref_tune.trainer import PreferenceTrainer

    params = run.params
    seed_everything(run.seed)
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    checkpoints = art.work / "checkpoints"
    singles = as_singles(learnt) if params.loss == "kto" else []
    config = trainer_config(
        run,
        checkpoints,
        dtype,
        steps=optimizer_steps(params, len(singles) or len(learnt.pairs)),
        learning_rate=rate(params),
        use_cpu=where.type == "cpu",
    )
    stored = stored_dtype(params.method, dtype)
    model = load_frozen(base, where, stored, quantization(params), params.trust_remote_code)
    without_dropout(model)
    with fused(model, where, causal_masks=True), config.main_process_first(local=False):
        lesson = prepare(run, art, model, tokenizer, config, learnt.pairs, singles)
    model = apply_method(model, tokenizer, params, _first_prompt(learnt, tokenizer))
    if lesson.packs and _is_prompt_learning(model):
        lesson.packs = False
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    counts = log_parameters(run, model, f"{params.loss} by {params.method}", dtype, where)
    callbacks = [MarkComplete(), StopOnNaN(), progress_report(run, ("loss", "margin", "accuracy"))]
    trainer = PreferenceTrainer(model, config, tokenizer, lesson, callbacks)
    with trainer.accelerator.main_process_first():
        resume = resume_point(run, checkpoints, art)
    started = time.monotonic()
    with fused(model, where, causal_masks=True):  # none but those of packed pairs
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    log_done(run, started, resume, where, packed=lesson.packs)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return Fitted(
        trained,
        tokenizer,
        where,
        dtype,
        lesson.packs,
        counts,
        trainer.state.global_step,
        trainer.log_lines(),
    )


def _first_prompt(learnt: Examples, tokenizer: Any) -> str:
    """What prefix and prompt start from."""
    text = learnt.pairs[0].chosen if learnt.pairs else learnt.singles[0].text
    return str(tokenizer.decode(text.ids[: text.prompt]))


def _is_prompt_learning(model: Any) -> bool:
    return any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values())


def _save(run: Run[TrainParams], art: Artifact, base: ModelRef, fitted: Fitted) -> None:
    """The trained weights in their ecosystem's format, without anything that varies between runs."""
    model = fitted.model
    model.config.use_cache = True
    if run.params.method == "full":
        model.save_pretrained(art.dir)
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base.path, base.revision
        model.save_pretrained(art.dir, save_embedding_layers=False)
        settle_adapter_config(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    fitted.tokenizer.save_pretrained(art.dir)
    write_log(art, fitted.log)


def _record(
    art: Artifact, fitted: Fitted, learnt: Examples, report: dict[str, Any], head: dict[str, Any]
) -> None:
    params: TrainParams = art.run.params
    art.extra["method"] = params.method
    art.extra["dtype"] = dtype_name(fitted.dtype)
    if (scheme := quantization(params)) is not None:
        art.extra["quantization"] = scheme
    art.metrics.update(
        trainable_parameters=fitted.counts["trainable"],
        total_parameters=fitted.counts["total"],
        pairs=len(learnt.pairs),
        labelled=len(learnt.singles),
        beta=report["beta"],
        steps=fitted.steps,
        final_loss=next((e["loss"] for e in reversed(fitted.log) if "loss" in e), None),
        **head,
    )
