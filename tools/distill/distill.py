"""Distillation from top to bottom: a teacher and records in, a student and its report out."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, seed_everything
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import model_input, parameter_counts
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Located
from tuneutils.shared.tuning import (
    log_done,
    optimizer_steps,
    progress_report,
    resume_point,
    trainer_config,
    write_log,
)
from tuneutils.tools.distill.capabilities import HELDOUT, parse_capabilities
from tuneutils.tools.distill.data import Examples, encode_stream, open_stream, taken
from tuneutils.tools.distill.judge import held_out_sets, judge, load_baseline
from tuneutils.tools.distill.params import Params
from tuneutils.tools.distill.plan import check_options, shape_of
from tuneutils.tools.distill.setup import Setup, load, prepare, teacher_identity


def distill(run: Run[Params]) -> dict[str, Any]:
    """Run ``distill``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    teacher_ref, student_ref = check_options(params)
    records = open_stream(run, run.inputs, "records")
    heldout = open_stream(run, [params.heldout], HELDOUT) if params.heldout else None
    capabilities, capability_inputs = parse_capabilities(run)
    inputs = [model_input(params.model, "teacher"), *records.inputs]
    inputs += [model_input(params.student, "student")] if params.student else []
    inputs += heldout.inputs if heldout else []
    inputs += capability_inputs
    inputs += [model_input(params.baseline, "baseline")] if params.baseline else []
    setup = prepare(run, teacher_ref, student_ref, inputs[0])
    with run.artifact("model", inputs) as art:
        art.licence = inputs[0].licence
        teacher = load(teacher_ref, setup, "float32")
        records = _written_by_teacher(setup, art, teacher, records)
        theirs = setup.teacher_tokenizer if params.loss == "uld" and setup.other else None
        examples = encode_stream(run, records, setup.tokenizer, theirs, setup.limit)
        run.log.info(
            "%d examples, %d tokens, %d learnt", len(examples.student), examples.tokens, examples.learnt
        )
        sets = held_out_sets(setup, heldout, capabilities)
        baseline = load_baseline(setup) if params.baseline else None
        student, pairs = _student(setup, art, teacher, examples)
        teacher = teacher.to(setup.dtype)
        _train(setup, art, teacher, student, pairs, examples)
        judge(setup, art, teacher, student.to(setup.dtype), baseline, sets)
    return {"output": run.output, "metrics": art.metrics}


def _written_by_teacher(setup: Setup, art: Artifact, teacher: Any, records: Source) -> Source:
    """With ``--data teacher``, the records with the teacher's answers in place of their own."""
    from tuneutils.tools.distill.answers import teacher_records

    params = setup.run.params
    if params.data != "teacher":
        return records
    sampling = _sampling(setup, setup.teacher_tokenizer)
    located = list(records.located)
    with setup.run.progress(len(located), "the teacher writes", "answers") as bar:
        try:
            written = teacher_records(
                art.work.parent / "teacher-answers",
                json.dumps(teacher_identity(setup), sort_keys=True),
                lambda: teacher.to(setup.dtype),
                setup.teacher_tokenizer,
                [item.record for item in located],
                sampling,
                prompt_tokens=params.prompt_tokens,
                template=params.template,
                progress=bar.update,
            )
        except ValueError as exc:
            raise ToolError(f"{records.reader.paths[0]}: {exc}") from exc
    if not written:
        raise ToolError("the teacher answered nothing; try another --sampling-temperature")
    teacher.float()
    return replace(records, located=[Located(r, "<teacher>", i + 1) for i, r in enumerate(written)])


def _sampling(setup: Setup, tokenizer: Any) -> Any:
    from tuneutils.shared.sample import Sampling

    params = setup.run.params
    return Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.sampling_temperature,
        stop_token_ids=(tokenizer.eos_token_id,),
        seed=setup.run.seed,
    )


def _student(setup: Setup, art: Artifact, teacher: Any, examples: Examples) -> tuple[Any, list[int]]:
    """The student in float32, and the teacher layer that each of its layers is matched with."""
    from tuneutils.shared.narrowing import influential_layers, make_student, matched_layers

    run = setup.run
    params = run.params
    count = teacher.config.get_text_config().num_hidden_layers
    if setup.student_ref is not None:
        student = load(setup.student_ref, setup, "float32")
        kept = None
    else:
        shape = shape_of(params, teacher.config)
        by_influence = params.student_layers is not None and params.layer_importance == "block-influence"
        importance = None
        if by_influence or shape.narrows:
            importance = _importance(setup, teacher, examples, shape.narrows)
            art.extra["block_influence"] = [round(v, 6) for v in importance.influence.tolist()]
            if by_influence:
                assert params.student_layers is not None
                shape = replace(shape, layers=influential_layers(importance.influence, params.student_layers))
        student = make_student(teacher, shape, importance)
        kept = shape.layers if shape.layers is not None else tuple(range(count))
        art.extra["kept_layers"] = list(kept)
        run.log.info("layers kept: %s", ", ".join(map(str, kept)))
    sizes = [parameter_counts(m)["total"] for m in (teacher, student)]
    run.log.info("student: %d of the teacher's %d parameters", sizes[1], sizes[0])
    art.metrics.update(teacher_parameters=sizes[0], total_parameters=sizes[1])
    pairs = matched_layers(kept, student.config.get_text_config().num_hidden_layers, count)
    return student.to(setup.where), pairs


def _importance(setup: Setup, teacher: Any, examples: Examples, channels: bool) -> Any:
    import torch

    from tuneutils.shared.importance import measure_importance

    stream = [token for example in examples.student for token in example.input_ids]
    length = min(setup.limit, len(stream))
    rows = min(setup.run.params.calibration_rows, len(stream) // length)
    ids = torch.tensor(stream[: rows * length]).view(rows, length)
    with torch.autocast(setup.where.type, dtype=setup.dtype, enabled=setup.dtype != torch.float32):
        return measure_importance(teacher, ids, channels=channels)


def _train(
    setup: Setup, art: Artifact, teacher: Any, student: Any, pairs: list[int], examples: Examples
) -> None:
    from tuneutils.shared.adapters.fused_lora import fused
    from tuneutils.shared.training import MarkComplete, StopOnNaN
    from tuneutils.tools.distill.match import drop_projections
    from tuneutils.tools.distill.trainer import DistillTrainer

    run = setup.run
    seed_everything(run.seed)
    student.requires_grad_(True)
    student.config.use_cache = False
    if run.params.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
        student.get_output_embeddings().requires_grad_(False)
    if run.params.keep_zeros:
        _hold_zeros(student)
    lesson = _lesson(setup, art, teacher, student, pairs, examples)
    checkpoints = art.work / "checkpoints"
    trainer = DistillTrainer(
        lesson,
        student,
        trainer_config(
            run,
            checkpoints,
            setup.dtype,
            steps=optimizer_steps(run.params, len(examples.student)),
            learning_rate=run.params.learning_rate,
            use_cpu=setup.where.type == "cpu",
        ),
        setup.tokenizer,
        examples.student,
        callbacks=[MarkComplete(), StopOnNaN(), progress_report(run)],
    )
    resume = resume_point(run, checkpoints, art)
    started = time.monotonic()
    with fused(student, setup.where):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    reused = lesson.cache.reused if lesson.cache else None
    log_done(run, started, resume, setup.where, cache_reused=reused)
    drop_projections(student)
    student.config.use_cache = True
    student.requires_grad_(False).eval().save_pretrained(art.dir)
    setup.tokenizer.save_pretrained(art.dir)
    lines = trainer.log_lines()
    write_log(art, lines)
    art.extra["dtype"] = dtype_name(setup.dtype)
    art.extra["examples_sha256"] = examples.digest()
    art.metrics.update(
        examples=len(examples.student),
        tokens=examples.tokens,
        learnt_tokens=examples.learnt,
        steps=trainer.state.global_step,
        final_loss=next((e["loss"] for e in reversed(lines) if "loss" in e), None),
    )


def _hold_zeros(student: Any) -> None:
    """Give weights that are zero no gradient: Adam's moments, and so the weights, then stay zero."""
    for parameter in student.parameters():
        held = parameter == 0
        if held.any() and parameter.requires_grad:
            parameter.register_hook(lambda grad, held=held: grad.masked_fill(held, 0))


def _lesson(
    setup: Setup, art: Artifact, teacher: Any, student: Any, pairs: list[int], examples: Examples
) -> Any:
    from tuneutils.shared.divergences import Objective
    from tuneutils.shared.training import Collator
    from tuneutils.tools.distill.cache import open_cache
    from tuneutils.tools.distill.match import Matcher
    from tuneutils.tools.distill.trainer import Lesson

    params = setup.run.params
    if params.loss == "ce":
        return Lesson(None)
    objective = Objective(params.loss, params.beta, params.temperature, params.ce_weight)  # type: ignore[arg-type]
    lesson = Lesson(objective, teacher, seed=setup.run.seed)
    lesson.collate = Collator(setup.teacher_tokenizer.pad_token_id)
    lesson.teacher_examples = examples.teacher
    if params.top_k:
        every = examples.teacher or examples.student
        asked = {i: every[i] for i in taken(setup.run, [len(e) for e in examples.student])}
        with setup.run.progress(len(asked), "asking the teacher", "examples") as bar:
            lesson.cache = open_cache(
                Path(params.cache) if params.cache else art.work.parent / "teacher-logits",
                teacher_identity(setup),
                lambda: teacher,
                asked,
                k=params.top_k,
                temperature=params.temperature,
                pad_id=setup.teacher_tokenizer.pad_token_id,
                progress=bar.update,
            )
        if lesson.cache.reused:
            setup.run.log.info("teacher logits found in %s", lesson.cache.folder)
    if params.hidden_weight or params.attention_weight:
        lesson.matcher = Matcher(
            student,
            teacher,
            pairs,
            hidden_weight=params.hidden_weight,
            attention_weight=params.attention_weight,
        )
    if params.data == "student":
        lesson.sampling = _sampling(setup, setup.tokenizer)
        lesson.student_fraction = params.student_fraction
    return lesson
