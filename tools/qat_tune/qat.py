"""Quantization-aware training from top to bottom: a float model and records in, a quantized model out."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

from tuneutils.shared.artifact import Artifact, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.models import (
    ModelRef,
    context_length,
    load_adapter,
    load_base,
    load_tokenizer,
    model_input,
    parameter_counts,
)
from tuneutils.shared.record_source import open_source
from tuneutils.shared.supervise import LEARNABLE
from tuneutils.shared.tuning import (
    log_done,
    optimizer_steps,
    progress_report,
    resume_point,
    trainer_config,
    write_log,
)
from tuneutils.shared.weights import Weights, check_finite
from tuneutils.tools.qat_tune.data import Examples, encode_stream
from tuneutils.tools.qat_tune.params import Params
from tuneutils.tools.qat_tune.plan import check_options
from tuneutils.tools.qat_tune.settings import learning_rate, scale_rate


@dataclass
class Job:
    """What a run works on.

    Attributes:
        model: in float32, its matrices on the grid.
        layers: full name -> matrix on the grid.
        float_model: the given model in the precision that is computed in; None where nobody needs it.
        teacher: what is learnt from; None for the labels alone.
    """

    run: Run[Params]
    art: Artifact
    weights: Weights
    tokenizer: Any
    where: Any
    dtype: Any
    model: Any
    layout: Any
    layers: dict[str, Any]
    float_model: Any
    teacher: Any


def qat_tune(run: Run[Params]) -> dict[str, Any]:
    """Run ``qat-tune``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    ref, teacher_ref = check_options(params)
    weights = Weights(ref, trust_remote_code=params.trust_remote_code)
    records = open_source(run, run.inputs, "records", formats=LEARNABLE)
    heldout = open_source(run, [params.heldout], "heldout", formats=LEARNABLE) if params.heldout else None
    inputs = [model_input(params.model), *records.inputs]
    inputs += [model_input(params.teacher, "teacher")] if params.teacher else []
    inputs += heldout.inputs if heldout else []
    with run.artifact("model", inputs) as art:
        art.licence, art.source = inputs[0].licence, inputs[0].source
        tokenizer = load_tokenizer(ref, trust_remote_code=params.trust_remote_code)
        positions = context_length(ref, trust_remote_code=params.trust_remote_code)
        limit = min(params.max_length, positions or params.max_length)
        examples = encode_stream(run, records, tokenizer, limit)
        held = encode_stream(run, heldout, tokenizer, limit) if heldout else None
        run.log.info(
            "%d examples, %d tokens, %d learnt", len(examples.encoded), examples.tokens, examples.learnt
        )
        rounded, job = _prepare(run, art, ref, teacher_ref, weights, tokenizer, held is not None)
        columns = {}
        if held is not None:
            columns["float"], columns["rounded"] = _compare(job, rounded, held)
        del rounded
        _train(job, examples)
        _save(job)
        if held is not None:
            _, columns["trained"] = _compare(job, job.model, held)
            _report(job, columns, held)
    return {"output": run.output, "kind": "model", "metrics": art.metrics}


def _prepare(
    run: Run[Params],
    art: Artifact,
    ref: ModelRef,
    teacher_ref: ModelRef | None,
    weights: Weights,
    tokenizer: Any,
    judged: bool,
) -> tuple[Any, Job]:
    """The model rounded to nearest (where it is to be judged), and all that training needs."""
    import torch

    from tuneutils.shared.layerwise import decoder_of
    from tuneutils.tools.qat_tune.convert import lay_out, put_on_grid, settle

    params = run.params
    seed_everything(run.seed)
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    model = load_base(ref, where, torch.float32, None, params.trust_remote_code)
    weights.check_names(model)
    for name, parameter in model.named_parameters():
        check_finite(ref.given, name, parameter)
    layout = lay_out(decoder_of(model, ref.given), weights, params)
    teacher = _load_teacher(run, teacher_ref, tokenizer, model.config, where, dtype) if teacher_ref else None
    float_model = rounded = None
    if judged or (params.loss != "ce" and teacher is None):
        float_model = copy.deepcopy(model).to(dtype).requires_grad_(False)
    if judged:
        rounded = copy.deepcopy(model)
        put_on_grid(rounded, layout, params, trained=False)
        settle(rounded, dtype)
    layers = put_on_grid(model, layout, params)
    counts = parameter_counts(model)
    run.log.info(
        "%d matrices on %d bits; %d parameters are trained, %s on %s",
        len(layers),
        layout.grid.bits,
        counts["trainable"],
        dtype_name(dtype),
        where,
    )
    art.metrics["trainable_parameters"] = counts["trainable"]
    teacher = None if params.loss == "ce" else teacher or float_model
    return rounded, Job(
        run, art, weights, tokenizer, where, dtype, model, layout, layers, float_model, teacher
    )


def _load_teacher(
    run: Run[Params], ref: ModelRef, tokenizer: Any, config: Any, where: Any, dtype: Any
) -> Any:
    """Another float model, its adapter merged in.

    Raises:
        ToolError: its vocabulary is another than the model's, or its weights are no numbers.
    """
    trust = run.params.trust_remote_code
    theirs = load_tokenizer(ref, trust_remote_code=trust)
    teacher = load_base(ref.root, where, dtype, None, trust)
    sizes = [c.get_text_config().vocab_size for c in (teacher.config, config)]
    if theirs.get_vocab() != tokenizer.get_vocab() or sizes[0] != sizes[1]:
        raise ToolError(
            f"--teacher {ref.given}: another vocabulary ({len(theirs)} tokens, {sizes[0]} logits) than the "
            f"model's ({len(tokenizer)}, {sizes[1]}); distil across vocabularies first: distill --loss uld"
        )
    if ref.kind == "adapter":
        teacher = load_adapter(teacher, ref.path).merge_and_unload()
    for name, parameter in teacher.named_parameters():
        check_finite(ref.given, name, parameter)
    return teacher.requires_grad_(False).eval()


def _train(job: Job, examples: Examples) -> None:
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.divergences import Objective
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.qat_tune.trainer import QatTrainer

    run, art = job.run, job.art
    params = run.params
    job.model.config.use_cache = False
    objective = None
    if params.loss != "ce":
        objective = Objective(params.loss, 0.5, params.temperature, params.ce_weight)  # type: ignore[arg-type]
    checkpoints = art.work / "checkpoints"
    trainer = QatTrainer(
        job.model,
        trainer_config(
            run,
            checkpoints,
            job.dtype,
            steps=optimizer_steps(params, len(examples.encoded)),
            learning_rate=learning_rate(params),
            use_cpu=job.where.type == "cpu",
        ),
        job.tokenizer,
        examples.encoded,
        teacher=job.teacher,
        objective=objective,
        scale_rate=scale_rate(params),
        callbacks=[MarkComplete(), StopOnNaN(), progress_report(run)],
    )
    resume = resume_point(run, checkpoints, art)
    started = time.monotonic()
    with fused(job.model, job.where):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    log_done(run, started, resume, job.where)
    logged = trainer.log_lines()
    write_log(art, logged)
    losses = [line["loss"] for line in logged if "loss" in line]
    art.metrics.update(
        examples=len(examples.encoded),
        tokens=examples.tokens,
        learnt_tokens=examples.learnt,
        cut=examples.cut,
        dropped=examples.dropped,
        steps=trainer.state.global_step,
        first_loss=losses[0] if losses else None,
        final_loss=losses[-1] if losses else None,
    )


def _save(job: Job) -> None:
    from tuneutils.tools.qat_tune.convert import settle, write

    art, params = job.art, job.run.params
    art.metrics.update(write(job.layers, job.layout, job.weights, art.dir, params))
    art.extra["compression"] = {"scheme": f"int{params.bits}", "method": "quantization-aware training"}
    art.extra["dtype"] = dtype_name(job.dtype)
    job.run.log.info(
        "%.3f bits a weight over all %d weights, %.1f MB",
        art.metrics["bits_per_weight"],
        art.metrics["weights"],
        art.metrics["bytes"] / 1e6,
    )
    settle(job.model, job.dtype)


def _compare(job: Job, model: Any, held: Examples) -> list[Any]:
    from tuneutils.shared.divergences_model import compare_models

    with job.run.progress(len(held.encoded), "judging", "sequences") as bar:
        return compare_models(
            job.float_model,
            [model],
            held.encoded,
            pad_id=job.tokenizer.pad_token_id,
            progress=bar.update,
        )


def _report(job: Job, columns: dict[str, Any], held: Examples) -> None:
    from tuneutils.tools.qat_tune.judge import MODELS, lines, report

    made = report(columns, held.origin, job.run.seed)
    for line in lines(made):
        job.run.log.info("%s", line)
    write_json(job.art.dir / "report.json", made)
    perplexity = {name: made["models"][name]["perplexity"]["value"] for name in MODELS}
    job.art.metrics["perplexity"] = perplexity
    job.art.metrics["recovered"] = made["recovered"]
    if any(value != value for value in perplexity.values()):
        raise GateFailed("the report holds what is no number; try a lower --learning-rate")
