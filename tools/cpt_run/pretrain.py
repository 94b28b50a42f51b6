"""Continual pre-training from top to bottom: text and a base model in, a model with a report out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, Input
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.methods import learning_rate, quantization
from tuneutils.shared.models import (
    Loaded,
    ModelRef,
    context_length,
    load_tokenizer,
    model_input,
    parameter_counts,
)
from tuneutils.shared.processes import is_main, world_size
from tuneutils.shared.record_source import open_source
from tuneutils.shared.supervise import LEARNABLE
from tuneutils.shared.tuning import (
    hush_others,
    load_frozen,
    log_done,
    log_parameters,
    progress_report,
    resume_point,
    save_tuned,
    stored_dtype,
    trainer_config,
)
from tuneutils.tools.cpt_run import report as reports
from tuneutils.tools.cpt_run import units
from tuneutils.tools.cpt_run.budget import steps_within
from tuneutils.tools.cpt_run.documents import Corpus, read_corpus
from tuneutils.tools.cpt_run.packing import Mixture, mix
from tuneutils.tools.cpt_run.params import Params
from tuneutils.tools.cpt_run.plan import check_options, with_embeddings
from tuneutils.tools.cpt_run.schedule import rate_factor
from tuneutils.tools.cpt_run.track import Tracker, bits_per_byte, mixed_precision, perplexity, read_texts

#: What of a time budget is planned; loading, saving and a machine that gets busier take the rest.
PLANNED = 0.95


@dataclass
class Setup:
    """All that is ready before the first step.

    Attributes:
        corpora: the domain's, and the replay's where there is one.
        loaded: the model that is trained.
        started: when the run began, by the monotonic clock.
    """

    run: Run[Params]
    art: Artifact
    corpora: list[Corpus]
    tracker: Tracker
    loaded: Loaded
    checkpoints: Path
    started: float

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.run.params.batch_size * self.run.params.gradient_accumulation * world_size()


def pretrain(run: Run[Params]) -> dict[str, Any]:
    """Run ``cpt-run``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
        GateFailed: more was forgotten than ``--max-forgetting`` allows; the artifact is there.
    """
    params, started = run.params, time.monotonic()
    hush_others(run)
    base = check_options(run, world_size())
    domain = open_source(run, run.inputs, "records", formats=LEARNABLE)
    replay = open_source(run, params.replay, "replay", formats=LEARNABLE) if params.replay else None
    named = {"domain": params.eval, "general": params.general}
    measured = {
        name: open_source(run, [path], name, formats=LEARNABLE) for name, path in named.items() if path
    }
    sources = [domain, *([replay] if replay else []), *measured.values()]
    inputs = [model_input(params.model), *(i for source in sources for i in source.inputs)]
    with _open_artifact(run, inputs) as art:
        art.licence = inputs[0].licence
        tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
        limit = min(params.max_length, context_length(base) or params.max_length)
        corpora = [read_corpus(run, domain, tokenizer, limit)]
        if replay:
            corpora.append(read_corpus(run, replay, tokenizer, limit))
        tracker = Tracker(read_texts(run, measured, tokenizer), limit, art.work / "checkpoints")
        for role, corpus in zip(("domain", "replay"), corpora, strict=False):
            run.log.info(
                "%s: %d documents, %d tokens in %d rows, %.1f %% full",
                role,
                corpus.documents,
                corpus.tokens,
                len(corpus.rows),
                100 * corpus.filled(limit),
            )
        seed_everything(run.seed)
        with _main_first(resolve_device(run.device).type == "cpu"):
            resume = resume_point(run, tracker.folder, art)
        loaded = _prepare(run, base, tokenizer)
        setup = Setup(run, art, corpora, tracker, loaded, tracker.folder, started)
        report = _train(setup, resume)
    reports.check_forgetting(_limit(params), report)
    return {"output": run.output, "metrics": art.metrics}


def _limit(params: Params) -> float | None:
    return units.share(params.max_forgetting, "--max-forgetting") if params.max_forgetting else None


def _open_artifact(run: Run[Params], inputs: list[Input]) -> Artifact:
    """The artifact to be written. One that is up to date still has its gate asked.

    Raises:
        UpToDate: it is there and passes.
        GateFailed: it is there and does not.
    """
    try:
        return run.artifact("model" if run.params.method == "full" else "adapter", inputs)
    except UpToDate:
        found = Path(str(run.output)) / "report.json"
        reports.check_forgetting(_limit(run.params), json.loads(found.read_text(encoding="utf-8")))
        raise


def _main_first(cpu: bool) -> Any:
    """Let the first of several processes go ahead: it may have to clear the folder of another run."""
    if world_size() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=cpu).main_process_first()


def _prepare(run: Run[Params], base: ModelRef, tokenizer: Any) -> Loaded:
    """The base in the precision that the method wants, with the method applied."""
    from tuneutils.tools.cpt_run.trainer import hides_documents

    params = run.params
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    stored = stored_dtype(params.method, dtype)
    model = load_frozen(base, where, stored, quantization(params), params.trust_remote_code)
    model = with_embeddings(model, tokenizer, params)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    if params.pack and not hides_documents(model, where):
        raise ToolError(
            f"{params.model}: documents in a row would see each other in this kind of model; --no-pack",
            code=ExitCode.USAGE,
        )
    log_parameters(run, model, params.method, dtype, where)
    return Loaded(model, tokenizer, base, where, dtype)


def _train(setup: Setup, resume: Path | None) -> reports.Report:
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.cpt_run.trainer import PackedTrainer, Rows

    run, loaded = setup.run, setup.loaded
    params = run.params
    full = params.method == "full"
    with fused(loaded.model, loaded.device, causal_masks=True, learning_norms=full):
        with run.progress(setup.tracker.windows, "measuring", "windows") as bar:
            _measure(setup, 0, bar.update)
        mixture = _plan(setup)
        steps = math.ceil(len(mixture.rows) / setup.step_rows)
        order: list[Any] = [(int(is_replay), row) for is_replay, row in mixture.rows]
        if world_size() > 1:  # every process needs as many micro-batches
            order += [None] * (-len(order) % (params.batch_size * world_size()))
        warmup = math.ceil(params.warmup * steps)
        trainer = PackedTrainer(
            loaded.model,
            trainer_config(
                run,
                setup.checkpoints,
                loaded.dtype,
                steps=steps,
                learning_rate=learning_rate(params),
                use_cpu=loaded.device.type == "cpu",
                eval_strategy="steps" if setup.tracker.texts and params.eval_every else "no",
                eval_steps=params.eval_every or None,
            ),
            Rows(setup.corpora, order),
            pad_id=loaded.pad_id,
            packed=params.pack,
            rate=lambda update: rate_factor(
                update, steps, schedule=params.schedule, warmup=warmup, final=params.final_rate
            ),
            measure=lambda step: _measure(setup, step),
            callbacks=[MarkComplete(), StopOnNaN(), progress_report(run)],
        )
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if setup.tracker.texts and steps not in setup.tracker.history:
            trainer.evaluate()
    log_done(run, began, resume, loaded.device)
    _recall(setup, steps)
    return _save(setup, trainer, mixture, steps)


def _measure(setup: Setup, step: int, progress: Callable[[int], None] | None = None) -> dict[str, float]:
    """Measure all texts, and say what was found."""
    tracker, seed, loaded = setup.tracker, setup.run.seed, setup.loaded
    if not tracker.texts:
        return {}
    was_training = loaded.model.training
    loaded.model.eval()
    with mixed_precision(loaded):
        found = tracker.measure(step, loaded, writes=is_main(), progress=progress)
    loaded.model.train(was_training)
    metrics = {}
    for name, items in found.items():
        metrics[f"{name}_bits_per_byte"] = bits_per_byte(items, seed).value
        value = perplexity(items, seed).value
        setup.run.log.info(
            "step %d: %s perplexity %.3f, %.4f bits per byte",
            step,
            name,
            value,
            metrics[f"{name}_bits_per_byte"],
        )
    return metrics


def _recall(setup: Setup, steps: int) -> None:
    """Read what an earlier start of this run measured at steps that were not repeated."""
    every = setup.run.params.eval_every
    due = {0, steps, *(range(every, steps, every) if every else ())} if setup.tracker.texts else set()
    for step in sorted(due - set(setup.tracker.history)):
        setup.tracker.measure(step, setup.loaded, writes=False)


def _plan(setup: Setup) -> Mixture:
    """The rows of the run. A time budget is turned into a number of steps once, which a resumed run keeps."""
    params = setup.run.params
    domain = setup.corpora[0].row_tokens()
    replay = setup.corpora[1].row_tokens() if len(setup.corpora) > 1 else []
    share = params.replay_share if replay else 0.0

    def ordered(**end: Any) -> Mixture:
        return mix(domain, replay, share, setup.run.seed, **end)

    if params.budget is None:
        return ordered(tokens=params.tokens) if params.tokens else ordered(epochs=params.epochs)
    kept = setup.checkpoints / "plan.json"
    if kept.is_file():
        steps = int(json.loads(kept.read_text(encoding="utf-8"))["steps"])
    else:
        steps = steps_within(
            run=setup.run,
            loaded=setup.loaded,
            corpus=setup.corpora[0],
            tracker=setup.tracker,
            left_s=PLANNED * units.seconds(params.budget) - (time.monotonic() - setup.started),
        )
        kept.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return ordered(rows=steps * setup.step_rows)


def _save(setup: Setup, trainer: Any, mixture: Mixture, steps: int) -> reports.Report:
    """The trained weights in their ecosystem's format, the log and the report."""
    run, art, params = setup.run, setup.art, setup.run.params
    facts = _facts(setup, mixture, steps)
    taught = _taught(setup, mixture)
    report = reports.make_report(setup.tracker, facts, taught, run.seed)
    save_tuned(art, trainer, setup.loaded.tokenizer)
    if not is_main():
        return report
    reports.write_report(art.dir, report)
    art.extra.update(method=params.method, dtype=dtype_name(setup.loaded.dtype))
    if (scheme := quantization(params)) is not None:
        art.extra["quantization"] = scheme
    counts = parameter_counts(setup.loaded.model)
    art.metrics.update(trainable_parameters=counts["trainable"], total_parameters=counts["total"])
    art.metrics.update({**facts, **reports.headline(report)})
    for name, text in report["texts"].items():
        change = reports.shown_change(text["perplexity_change"])
        run.log.info("%s perplexity %s, n = %d documents", name, change, text["documents"])
    return report


def _facts(setup: Setup, mixture: Mixture, steps: int) -> dict[str, Any]:
    domain = setup.corpora[0]
    return {
        "steps": steps,
        "rows": len(mixture.rows),
        "tokens": mixture.tokens,
        "domain_tokens": mixture.domain_tokens,
        "replay_tokens": mixture.replay_tokens,
        "replay_share": mixture.replay_share,
        "passes": mixture.domain_tokens / domain.tokens,
        "domain_documents": domain.documents,
        "split_documents": domain.split,
        "rows_filled": domain.filled(setup.tracker.max_length),
        "learning_rate": learning_rate(setup.run.params),
    }


def _taught(setup: Setup, mixture: Mixture) -> Any:
    """``f(step)``: tokens learnt through that step."""
    sizes = [corpus.row_tokens() for corpus in setup.corpora]
    done = [0]
    for is_replay, row in mixture.rows:
        done.append(done[-1] + sizes[int(is_replay)][row])
    return lambda step: done[min(step * setup.step_rows, len(mixture.rows))]
