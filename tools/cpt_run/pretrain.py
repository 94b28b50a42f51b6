"""Continual pre-training from top to bottom: text and a base model in, a model with a report out."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, Input, library_versions
from tuneutils.shared.checkpoints import last_checkpoint, run_identity
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.four_bit import keep_4bit_layout
from tuneutils.shared.methods import learning_rate, quantization, settle_adapter_config
from tuneutils.shared.models import (
    Loaded,
    ModelRef,
    context_length,
    load_base,
    load_tokenizer,
    model_input,
    parameter_counts,
    resolve,
)
from tuneutils.tools.cpt_run import report as reports
from tuneutils.tools.cpt_run import units
from tuneutils.tools.cpt_run.documents import Corpus, open_records, read_corpus
from tuneutils.tools.cpt_run.packing import Mixture, mix
from tuneutils.tools.cpt_run.params import Params
from tuneutils.tools.cpt_run.plan import check_options, with_embeddings
from tuneutils.tools.cpt_run.schedule import rate_factor
from tuneutils.tools.cpt_run.track import Tracker, bits_per_byte, perplexity, read_texts

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
    if not is_main():
        run.quiet = True
        run.log.setLevel("ERROR")
    base = check_options(run, world_size())
    domain = open_records(run, run.inputs, "records")
    replay = open_records(run, params.replay, "replay") if params.replay else None
    named = {"domain": params.eval, "general": params.general}
    measured = {name: open_records(run, [path], name) for name, path in named.items() if path}
    sources = [domain, *([replay] if replay else []), *measured.values()]
    inputs = [model_input(params.model), *(i for source in sources for i in source.inputs)]
    with _open_artifact(run, inputs) as art:
        art.licence = inputs[0].licence
        tokenizer = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
        limit = min(params.max_length, context_length(base) or params.max_length)
        corpora = [read_corpus(run, domain, tokenizer, limit, "records")]
        if replay:
            corpora.append(read_corpus(run, replay, tokenizer, limit, "replay"))
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
        resume = _resume_point(run, tracker.folder, inputs)
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


def _resume_point(run: Run[Params], checkpoints: Path, inputs: list[Input]) -> Path | None:
    """The checkpoint to go on from: only one of a run with the same inputs and parameters."""
    values = {k: v["value"] for k, v in run.manifest_params().items()}
    roles = [(i.role, i.sha256) for i in inputs]
    where = resolve_device(run.device).type
    identity = run_identity(values, run.seed, roles, library_versions(), world_size(), where)
    with _main_first(where == "cpu"):
        found = last_checkpoint(checkpoints, identity)
    if found is not None:
        run.log.info("going on from step %s", found.name.split("-")[1])
    return found


def _main_first(cpu: bool) -> Any:
    """Let the first of several processes go ahead: it may have to clear the folder of another run."""
    if world_size() == 1:
        return nullcontext()
    from accelerate import PartialState

    return PartialState(cpu=cpu).main_process_first()


def _prepare(run: Run[Params], base: ModelRef, tokenizer: Any) -> Loaded:
    """The base in the precision that the method wants, with the method applied."""
    import torch

    from tuneutils.tools.cpt_run.trainer import hides_documents

    params = run.params
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    # Full training keeps float32 master weights and multiplies in the precision asked for.
    stored = torch.float32 if params.method == "full" else dtype
    model = load_base(base, where, stored, quantization(params), params.trust_remote_code)
    keep_4bit_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    model = with_embeddings(model, tokenizer, params)
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    if params.pack and not hides_documents(model, where):
        raise ToolError(
            f"{params.model}: documents in a row would see each other in this kind of model; --no-pack",
            code=ExitCode.USAGE,
        )
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
    return Loaded(model, tokenizer, base, where, dtype)


def _train(setup: Setup, resume: Path | None) -> reports.Report:
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.cpt_run.settings import progress, training_arguments
    from tuneutils.tools.cpt_run.trainer import PackedTrainer, Rows

    run, art, loaded = setup.run, setup.art, setup.loaded
    params = run.params
    full = params.method == "full"
    with fused(loaded.model, loaded.device, causal_masks=True, learning_norms=full):
        _measure(setup, 0)
        mixture = _plan(setup)
        steps = math.ceil(len(mixture.rows) / setup.step_rows)
        order: list[Any] = [(int(is_replay), row) for is_replay, row in mixture.rows]
        if world_size() > 1:  # every process needs as many micro-batches
            order += [None] * (-len(order) % (params.batch_size * world_size()))
        warmup = math.ceil(params.warmup * steps)
        trainer = PackedTrainer(
            loaded.model,
            training_arguments(run, setup.checkpoints, steps, loaded, bool(setup.tracker.texts)),
            Rows(setup.corpora, order),
            pad_id=loaded.pad_id,
            packed=params.pack,
            rate=lambda update: rate_factor(
                update, steps, schedule=params.schedule, warmup=warmup, final=params.final_rate
            ),
            measure=lambda step: _measure(setup, step),
            callbacks=[MarkComplete(), StopOnNaN(), progress(run, lambda **e: _log_event(run, art, **e))],
        )
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if setup.tracker.texts and steps not in setup.tracker.history:
            trainer.evaluate()
    _log_event(run, art, event="done", train_s=time.monotonic() - began, resumed=bool(resume), **_peaks())
    _recall(setup, steps)
    return _save(setup, trainer, mixture, steps)


def _measure(setup: Setup, step: int) -> dict[str, float]:
    """Measure all texts, and say what was found."""
    import torch

    tracker, seed, loaded = setup.tracker, setup.run.seed, setup.loaded
    if not tracker.texts:
        return {}
    was_training = loaded.model.training
    loaded.model.eval()
    mixed = setup.run.params.method == "full" and loaded.dtype != torch.float32
    with torch.autocast(loaded.device.type, loaded.dtype) if mixed else nullcontext():
        found = tracker.measure(step, loaded, writes=is_main())
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
        steps = _steps_within(setup, units.seconds(params.budget))
        kept.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    return ordered(rows=steps * setup.step_rows)


def _steps_within(setup: Setup, budget_s: float) -> int:
    """Steps that fit into what is left of the budget, from the time of two micro-batches and one measurement.

    Raises:
        ToolError: exit 2, not even one step fits.
    """
    import torch

    from tuneutils.tools.cpt_run.trainer import Rows, collate, row_nll

    params, model = setup.run.params, setup.loaded.model
    rows = Rows(setup.corpora, [(0, i % len(setup.corpora[0].rows)) for i in range(params.batch_size)])
    batch = collate([rows[i] for i in range(len(rows))], setup.loaded.pad_id)
    batch = {name: tensor.to(setup.loaded.device) for name, tensor in batch.items()}
    took = 0.0
    with torch.random.fork_rng():
        model.train()
        for _ in range(2):  # the first one also allocates
            began = time.monotonic()
            row_nll(model, batch, params.pack).backward()
            if setup.loaded.device.type == "cuda":
                torch.cuda.synchronize()
            took = time.monotonic() - began
            model.zero_grad(set_to_none=True)
    began = time.monotonic()
    if setup.tracker.texts:
        name, texts = next(iter(setup.tracker.texts.items()))
        probe = Tracker({name: texts[:8]}, setup.tracker.max_length, setup.checkpoints / "none")
        probe.measure(0, setup.loaded, writes=False)
        share = sum(len(s) for s, _ in texts[:8]) / sum(
            len(s) for one in setup.tracker.texts.values() for s, _ in one
        )
        measuring = (time.monotonic() - began) / share
    else:
        measuring = 0.0
    left = PLANNED * budget_s - (time.monotonic() - setup.started)
    per_step = params.gradient_accumulation * took
    steps = int((left - measuring) / per_step)
    if params.eval_every:
        steps = int((left - measuring) / (per_step + measuring / params.eval_every))
    if steps < 1:
        raise ToolError(
            f"--budget {params.budget}: a step takes {per_step:.1f} s and a measurement {measuring:.1f} s, "
            f"of which {max(0.0, left):.1f} s are left after loading; give more, or a smaller --eval-limit",
            code=ExitCode.USAGE,
        )
    setup.run.log.info(
        "budget %s: %d steps of %.2f s, %.1f s a measurement", params.budget, steps, per_step, measuring
    )
    return steps


def _save(setup: Setup, trainer: Any, mixture: Mixture, steps: int) -> reports.Report:
    """The trained weights in their ecosystem's format, the log and the report."""
    run, art, params = setup.run, setup.art, setup.run.params
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    facts = _facts(setup, mixture, steps)
    taught = _taught(setup, mixture)
    report = reports.make_report(setup.tracker, facts, taught, run.seed)
    if not is_main():
        return report
    model.config.use_cache = True
    if params.method == "full":
        model.save_pretrained(art.dir, state_dict=state)
    else:
        config = model.peft_config["default"]
        base = resolve(params.model)
        config.base_model_name_or_path, config.revision = base.path, base.revision
        kwargs: dict[str, Any] = {"state_dict": state} if state is not None else {}
        model.save_pretrained(art.dir, save_embedding_layers=False, **kwargs)
        settle_adapter_config(art.dir)
    (art.dir / "README.md").unlink(missing_ok=True)
    setup.loaded.tokenizer.save_pretrained(art.dir)
    with open(art.dir / "log.jsonl", "w", encoding="utf-8") as stream:
        for line in trainer.log_lines():
            stream.write(json.dumps(line) + "\n")
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


def _peaks() -> dict[str, int]:
    import resource

    import torch

    made = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        made["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return made


def _log_event(run: Run[Params], art: Artifact, **event: Any) -> None:
    """A line of the run log: what depends on clock and machine belongs here, not in the artifact."""
    if not is_main():
        return
    art.work.mkdir(parents=True, exist_ok=True)
    with open(art.work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")


def world_size() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0
