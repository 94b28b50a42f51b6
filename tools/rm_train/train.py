"""Training a reward model from top to bottom: preferences and a base in, a scorer with its evaluation out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.methods import apply_method, learning_rate, settle_adapter_config
from tuneutils.shared.models import ModelRef, load_tokenizer, model_input
from tuneutils.shared.pairs import Pair, read_pairs, split, validate
from tuneutils.shared.processes import is_main
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.reward_model import NORMALISATION, TEXT, RewardModel, load_classifier
from tuneutils.shared.tuning import (
    hush_others,
    log_done,
    log_parameters,
    optimizer_steps,
    progress_report,
    resume_point,
    stored_dtype,
    training_options,
    write_log,
)
from tuneutils.tools.rm_train.normalise import measured_on, open_demonstrations
from tuneutils.tools.rm_train.params import TrainParams
from tuneutils.tools.rm_train.plan import check_options, text_limit, with_head
from tuneutils.tools.rm_train.report import headline, measure, say, write_report
from tuneutils.tools.rm_train.scored import sample, score_pairs


@dataclass
class Fitted:
    """What training leaves: the trained model, its parameter counts, steps and log."""

    rm: RewardModel
    counts: dict[str, int]
    steps: int
    log: list[dict[str, Any]]


def train(run: Run[TrainParams]) -> dict[str, Any]:
    """Run ``rm-train train``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    hush_others(run)
    base = check_options(params)
    source = open_source(run, run.inputs, "records", validate=validate)
    evals = {
        name: open_source(run, [path], role, validate=validate)
        for name, (role, path) in named(params.eval).items()
    }
    demonstrations = open_demonstrations(run)
    inputs = [model_input(params.model), *source.inputs]
    inputs += [i for s in (*evals.values(), demonstrations) if s is not None for i in s.inputs]
    with run.artifact("reward-model", inputs) as art:
        art.licence = inputs[0].licence
        tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
        limit = text_limit(params, base)
        pairs, held = _sides(run, art, source, evals, tokenizer, limit)
        fitted = fit(run, art, base, tokenizer, pairs, limit)
        if not is_main():
            return {}
        rm = fitted.rm
        learnt = score_pairs(rm, sample(pairs, run.seed), params.batch_size)
        if params.normalise != "none":
            rm.mean, rm.std = measured_on(run, rm, learnt, demonstrations)
        scored = {name: score_pairs(rm, some, params.batch_size) for name, some in held.items()}
        report = measure(rm, scored, learnt=learnt, seed=run.seed)
        say(run, report)
        _save(run, art, base, fitted)
        write_report(run, art.dir, report, list(scored.values()))
        _record(art, fitted, pairs, report)
    return {"output": run.output, "metrics": art.metrics}


def named(given: Sequence[str]) -> dict[str, tuple[str, str]]:
    """``[NAME=]FILE`` → name → role among the inputs and file; one without a name is ``eval``, ``eval-2``, …

    Raises:
        ToolError: two have one name (2).
    """
    made: dict[str, tuple[str, str]] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or "/" in name:
            name, path = "eval" if "eval" not in made else f"eval-{len(made) + 1}", entry
        if name in ("train", *made):
            raise ToolError(
                f"--eval {entry}: the name {name!r} is taken; choose another", code=ExitCode.USAGE
            )
        made[name] = (name if name.startswith("eval") else f"eval-{name}", path)
    return made


def _sides(
    run: Run[TrainParams],
    art: Artifact,
    source: Source,
    evals: dict[str, Source],
    tokenizer: Any,
    limit: int,
) -> tuple[list[Pair], dict[str, list[Pair]]]:
    """What is learnt, and what is held out by name."""
    params = run.params
    found = read_pairs(run, source, tokenizer, template=params.template, limit=limit)
    art.metrics.update(truncated=found.truncated, dropped=found.dropped, refused=found.refused)
    if evals:
        pairs = found.pairs
        held = {
            name: read_pairs(run, one, tokenizer, template=params.template, limit=limit).pairs
            for name, one in evals.items()
        }
    else:
        pairs, kept = split(found.pairs, params.eval_share, run.seed)
        held = {"heldout": kept} if kept else {}
    known = {p.key for p in pairs}
    for name, others in held.items():
        if leaked := len({p.key for p in others} & known):
            run.log.warning("%d prompts of %s are also learnt from; its numbers flatter", leaked, name)
    run.log.info("%d pairs to learn from, %d held out", len(pairs), sum(map(len, held.values())))
    return pairs, held


def fit(
    run: Run[TrainParams], art: Artifact, base: ModelRef, tokenizer: Any, pairs: Sequence[Pair], limit: int
) -> Fitted:
    """Train on the pairs; goes on from the last checkpoint of the same run."""
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.rm_train.trainer import PairTrainer

    params = run.params
    seed_everything(run.seed)
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    model = load_classifier(
        base,
        where,
        stored_dtype(params.method, dtype),
        tokenizer.pad_token_id,
        new_head_seed=run.seed,
        trust_remote_code=params.trust_remote_code,
    )
    model.requires_grad_(False)
    model = apply_method(model, tokenizer, with_head(params), ".")
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    counts = log_parameters(run, model, params.method, dtype, where)
    checkpoints = art.work / "checkpoints"
    trainer = PairTrainer(
        model,
        _config(run, checkpoints, dtype, len(pairs), where.type == "cpu"),
        tokenizer,
        pairs,
        margin_scale=params.margin_scale,
        soft_labels=params.soft_labels,
        centre=params.centre,
        callbacks=[MarkComplete(), StopOnNaN(), progress_report(run, ("loss", "accuracy"))],
    )
    with trainer.accelerator.main_process_first():
        resume = resume_point(run, checkpoints, art)
    started = time.monotonic()
    with fused(model, where, causal_masks=True):  # none but those of packed pairs
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    log_done(run, started, resume, where)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    rm = RewardModel(trained, tokenizer, where, dtype, template=params.template, max_length=limit)
    return Fitted(rm, counts, trainer.state.global_step, trainer.log_lines())


def _config(run: Run[TrainParams], folder: Path, dtype: Any, pairs: int, use_cpu: bool) -> Any:
    """TRL's RewardConfig for our parameters; its data preparation is off, since pairs come encoded."""
    from trl import RewardConfig

    options = training_options(
        run,
        folder,
        dtype,
        steps=optimizer_steps(run.params, pairs),
        learning_rate=learning_rate(run.params),
        use_cpu=use_cpu,
    )
    return RewardConfig(**options, max_length=None)


def _save(run: Run[TrainParams], art: Artifact, base: ModelRef, fitted: Fitted) -> None:
    """The trained weights in their ecosystem's format, without anything that varies between runs."""
    model, tokenizer = fitted.rm.model, fitted.rm.tokenizer
    if run.params.method != "full":
        folder = art.work / "adapter" if run.params.merge else art.dir
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base.path, base.revision
        model.save_pretrained(folder, save_embedding_layers=False)
        settle_adapter_config(folder)
        if run.params.merge:
            model = _merged(run, base, tokenizer, folder)
    if run.params.method == "full" or run.params.merge:
        model.config.use_cache = True
        model.save_pretrained(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(art.dir)
    write_log(art, fitted.log)


def _merged(run: Run[TrainParams], base: ModelRef, tokenizer: Any, adapter: Path) -> Any:
    """The adapter merged in float32, whatever precision it was trained in."""
    import torch

    from tuneutils.shared.models import load_adapter

    model = load_classifier(
        base,
        torch.device("cpu"),
        torch.float32,
        tokenizer.pad_token_id,
        new_head_seed=run.seed,
        trust_remote_code=run.params.trust_remote_code,
    )
    return load_adapter(model, str(adapter)).merge_and_unload()


def _record(art: Artifact, fitted: Fitted, pairs: Sequence[Pair], report: dict[str, Any]) -> None:
    rm = fitted.rm
    art.extra["method"] = art.run.params.method
    art.extra["dtype"] = dtype_name(rm.dtype)
    art.extra[TEXT] = {"template": rm.template, "max_length": rm.max_length}
    if art.run.params.normalise != "none":
        art.extra[NORMALISATION] = {"mean": rm.mean, "std": rm.std}
    art.metrics.update(
        trainable_parameters=fitted.counts["trainable"],
        total_parameters=fitted.counts["total"],
        pairs=len(pairs),
        tokens=sum(len(p.chosen.ids) + len(p.rejected.ids) for p in pairs),
        steps=fitted.steps,
        final_loss=next((e["loss"] for e in reversed(fitted.log) if "loss" in e), None),
        **headline(report),
    )
