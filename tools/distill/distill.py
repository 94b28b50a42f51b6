"""Distillation from top to bottom: a teacher and records in, a student and its report out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, Input, library_versions, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype, seed_everything
from tuneutils.shared.errors import ExitCode, GateFailed, ToolError
from tuneutils.shared.models import (
    ModelRef,
    load_adapter,
    load_base,
    load_config,
    load_tokenizer,
    model_input,
    parameter_counts,
)
from tuneutils.shared.records import Located
from tuneutils.shared.supervise import Encoded
from tuneutils.tools.distill.capabilities import HELDOUT, Capability, parse_capabilities
from tuneutils.tools.distill.data import (
    Examples,
    Stream,
    encode_one,
    encode_stream,
    open_stream,
    same_tokenizer,
)
from tuneutils.tools.distill.params import Params
from tuneutils.tools.distill.plan import check_options, shape_of
from tuneutils.tools.distill.settings import log_event, progress_callback, resume_point, training_config


@dataclass
class Setup:
    """What a run works on.

    Attributes:
        other: teacher and student have different vocabularies.
        limit: longest example, in tokens.
    """

    run: Run[Params]
    teacher_ref: ModelRef
    student_ref: ModelRef | None
    teacher_input: Input
    teacher_tokenizer: Any
    tokenizer: Any
    other: bool
    limit: int
    where: Any
    dtype: Any


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
    setup = _setup(run, teacher_ref, student_ref, inputs[0])
    with run.artifact("model", inputs) as art:
        art.licence = inputs[0].licence
        teacher = _load(teacher_ref, setup, "float32")
        records = _written_by_teacher(setup, art, teacher, records)
        theirs = setup.teacher_tokenizer if params.loss == "uld" and setup.other else None
        examples = encode_stream(run, records, setup.tokenizer, theirs, setup.limit)
        run.log.info(
            "%d examples, %d tokens, %d learnt", len(examples.student), examples.tokens, examples.learnt
        )
        sets = _held_out_sets(setup, heldout, capabilities)
        baseline = _baseline(setup) if params.baseline else None
        student, pairs = _student(setup, art, teacher, examples)
        teacher = teacher.to(setup.dtype)
        _train(setup, art, teacher, student, pairs, examples)
        _report(setup, art, teacher, student.to(setup.dtype), baseline, sets)
    return {"output": run.output, "metrics": art.metrics}


def _setup(run: Run[Params], teacher: ModelRef, student: ModelRef | None, teacher_input: Input) -> Setup:
    params = run.params
    trust = params.trust_remote_code
    theirs = load_tokenizer(teacher, trust_remote_code=trust)
    ours = load_tokenizer(student, trust_remote_code=trust) if student else theirs
    configs = [
        load_config(ref, trust_remote_code=trust).get_text_config() for ref in (teacher, student or teacher)
    ]
    other = not same_tokenizer(ours, theirs) or configs[0].vocab_size != configs[1].vocab_size
    if other and params.loss not in ("uld", "ce"):
        raise ToolError(
            f"{params.model}: another vocabulary ({len(theirs)} tokens, {configs[0].vocab_size} logits) than "
            f"the student's ({len(ours)}, {configs[1].vocab_size}); --loss uld distils across vocabularies"
        )
    if other and params.data == "student":
        raise ToolError("--data student needs one vocabulary for both", code=ExitCode.USAGE)
    positions = [getattr(c, "max_position_embeddings", None) or 1 << 40 for c in configs]
    where = resolve_device(run.device)
    return Setup(
        run,
        teacher,
        student,
        teacher_input,
        theirs,
        ours,
        other,
        min(params.max_length, *positions),
        where,
        resolve_dtype(run.dtype, where),
    )


def _load(ref: ModelRef, setup: Setup, precision: str) -> Any:
    """A plain model, its adapter merged in; refused when its weights are no numbers."""
    import torch

    dtype = {"float32": torch.float32}.get(precision, setup.dtype)
    model = load_base(ref.root, setup.where, dtype, None, setup.run.params.trust_remote_code)
    if ref.kind == "adapter":
        model = load_adapter(model, ref.path).merge_and_unload()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ToolError(f"{ref.given}: {name} holds NaN or infinity; import the model again")
    return model.requires_grad_(False).eval()


def _written_by_teacher(setup: Setup, art: Artifact, teacher: Any, records: Stream) -> Stream:
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
                json.dumps(_teacher_identity(setup), sort_keys=True),
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
    from tuneutils.tools.distill.students import influential_layers, make_student, matched_layers

    run = setup.run
    params = run.params
    count = teacher.config.get_text_config().num_hidden_layers
    if setup.student_ref is not None:
        student = _load(setup.student_ref, setup, "float32")
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

    from tuneutils.tools.distill.importance import measure_importance

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
    lesson = _lesson(setup, art, teacher, student, pairs, examples)
    checkpoints = art.work / "checkpoints"
    trainer = DistillTrainer(
        lesson,
        student,
        training_config(run, checkpoints, setup.dtype, len(examples.student), setup.where),
        setup.tokenizer,
        examples.student,
        callbacks=[MarkComplete(), StopOnNaN(), progress_callback(run, art)],
    )
    resume = resume_point(run, checkpoints, art)
    started = time.monotonic()
    with fused(student, setup.where):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    log_event(
        run,
        art,
        event="done",
        train_s=time.monotonic() - started,
        resumed=bool(resume),
        device=str(setup.where),
        cache_reused=lesson.cache.reused if lesson.cache else None,
    )
    drop_projections(student)
    student.config.use_cache = True
    student.requires_grad_(False).eval().save_pretrained(art.dir)
    setup.tokenizer.save_pretrained(art.dir)
    lines = trainer.log_lines()
    (art.dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    art.extra["dtype"] = dtype_name(setup.dtype)
    art.extra["examples_sha256"] = examples.digest()
    art.metrics.update(
        examples=len(examples.student),
        tokens=examples.tokens,
        learnt_tokens=examples.learnt,
        steps=trainer.state.global_step,
        final_loss=next((e["loss"] for e in reversed(lines) if "loss" in e), None),
    )


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
        asked = examples.teacher or examples.student
        with setup.run.progress(len(asked), "asking the teacher", "examples") as bar:
            lesson.cache = open_cache(
                Path(params.cache) if params.cache else art.work.parent / "teacher-logits",
                _teacher_identity(setup),
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


def _teacher_identity(setup: Setup) -> dict[str, Any]:
    """What a teacher's answers and distributions depend on, besides what it is asked."""
    root = setup.teacher_ref.root
    versions = library_versions()
    return {
        "teacher": setup.teacher_input.sha256,
        "base": None if root is setup.teacher_ref else model_input(root.given).sha256,
        "dtype": dtype_name(setup.dtype),
        "device": setup.where.type,
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
    }


def _report(
    setup: Setup,
    art: Artifact,
    teacher: Any,
    student: Any,
    baseline: Any,
    sets: dict[str, list[Encoded]],
) -> None:
    """Compare teacher, student and baseline on each set of records; speed goes to the run log."""
    from tuneutils.tools.distill.report import describe, finite, one_line
    from tuneutils.tools.distill.speed import speed_up

    run = setup.run
    params = run.params
    for model in (teacher, student):
        model.set_attn_implementation("sdpa")  # matching attention needed the slow one
    made: dict[str, Any] = {}
    for name, sequences in sets.items():
        models = _compare(setup, teacher, student, baseline, sequences)
        made[name] = describe(models, run.seed)
        run.log.info("%s", one_line(name, made[name]))
    if params.baseline:
        made["baseline"] = _baseline_facts(setup, art)
    if not finite(made):
        raise GateFailed("the report holds what is no number; try a lower --learning-rate")
    if made:
        write_json(art.dir / "report.json", made)
        art.metrics["report"] = {name: _headline(made[name]) for name in sets}
    if params.speed:
        speed = speed_up(teacher, student, setup.tokenizer.pad_token_id)
        log_event(run, art, event="speed", **speed)
        for what, value in speed.items():
            run.log.info("%s: %.2f times the teacher's speed", what, value["speed_up"]["value"])


def _headline(made: dict[str, Any]) -> dict[str, Any]:
    """The metrics that people ask for first, for the manifest."""
    shown = {name: value["value"] for name, value in made["models"]["student"].items()}
    if "accuracy" in made.get("kept", {}).get("student", {}):
        shown["accuracy_kept"] = made["kept"]["student"]["accuracy"]["value"]
    return shown


def _held_out_sets(
    setup: Setup, heldout: Stream | None, capabilities: list[Capability]
) -> dict[str, list[Encoded]]:
    """Name → sequences: the held-out records, and those of each capability.

    A record is one sequence, cut to the limit, so that what is resampled are records.
    """
    params = replace(setup.run.params, data="records")
    located = list(heldout.located) if heldout else []
    sets = ({HELDOUT: located} if heldout else {}) | {c.name: c.pick(located) for c in capabilities}
    made: dict[str, list[Encoded]] = {}
    for name, items in sets.items():
        made[name] = []
        for item in items:
            try:
                made[name].append(encode_one(item.record, setup.tokenizer, params, setup.limit)[0])
            except ValueError as exc:
                raise ToolError(f"{item.place}: {exc}") from exc
    return made


def _baseline(setup: Setup) -> Any:
    from tuneutils.shared.models import resolve

    given = str(setup.run.params.baseline)
    ref = resolve(given)
    if not same_tokenizer(load_tokenizer(ref), setup.tokenizer):
        raise ToolError(f"--baseline {given}: has another tokenizer than the student")
    return _load(ref, setup, "as asked")


def _compare(
    setup: Setup, teacher: Any, student: Any, baseline: Any, sequences: list[Encoded]
) -> dict[str, Any]:
    from tuneutils.shared.divergences_model import compare_models

    models = {} if setup.other else {"teacher": teacher}
    models["student"] = student
    if baseline is not None:
        models["baseline"] = baseline
    first, *rest = models.values()
    found = compare_models(first, rest, sequences, pad_id=setup.tokenizer.pad_token_id)
    return dict(zip(models, found, strict=True))


def _baseline_facts(setup: Setup, art: Artifact) -> dict[str, Any]:
    """Whether the baseline had the same tokens, steps and size, from its manifest."""
    from tuneutils.shared.models import resolve

    manifest = resolve(str(setup.run.params.baseline)).manifest
    metrics = manifest.get("metrics", {})
    facts = {
        "same_examples": manifest.get("examples_sha256") == art.extra["examples_sha256"],
        "same_steps": metrics.get("steps") == art.metrics["steps"],
        "same_parameters": metrics.get("total_parameters") == art.metrics["total_parameters"],
        "same_layers": manifest.get("kept_layers") == art.extra.get("kept_layers"),
        "same_seed": manifest.get("seed") == setup.run.seed,
    }
    different = [name.removeprefix("same_") for name, same in facts.items() if not same]
    if different:
        setup.run.log.warning("the baseline differs in %s, not only in its loss", ", ".join(different))
    return facts
