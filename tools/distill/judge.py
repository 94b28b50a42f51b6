"""The student judged beside its teacher and a baseline, on held-out records and by capability."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tuneutils.shared.artifact import Artifact, log_event, write_json
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.models import load_tokenizer
from tuneutils.shared.record_source import Source
from tuneutils.shared.supervise import Encoded
from tuneutils.tools.distill.capabilities import HELDOUT, Capability
from tuneutils.tools.distill.data import encode_one, same_tokenizer
from tuneutils.tools.distill.setup import Setup, load


def judge(
    setup: Setup,
    art: Artifact,
    teacher: Any,
    student: Any,
    baseline: Any,
    sets: dict[str, list[Encoded]],
) -> None:
    """Compare teacher, student and baseline on each set of records; speed goes to the run log."""
    from tuneutils.shared.speed_up import speed_up
    from tuneutils.tools.distill.report import describe, finite, one_line

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
        made["baseline"] = baseline_facts(setup, art)
    if not finite(made):
        raise GateFailed("the report holds what is no number; try a lower --learning-rate")
    if made:
        write_json(art.dir / "report.json", made)
        art.metrics["report"] = {name: _headline(made[name]) for name in sets}
    if params.speed:
        speed = speed_up(teacher, student, setup.tokenizer.pad_token_id)
        log_event(run, event="speed", **speed)
        for what, value in speed.items():
            run.log.info("%s: %.2f times the teacher's speed", what, value["speed_up"]["value"])


def _headline(made: dict[str, Any]) -> dict[str, Any]:
    """The metrics that people ask for first, for the manifest."""
    shown = {name: value["value"] for name, value in made["models"]["student"].items()}
    if "accuracy" in made.get("kept", {}).get("student", {}):
        shown["accuracy_kept"] = made["kept"]["student"]["accuracy"]["value"]
    return shown


def held_out_sets(
    setup: Setup, heldout: Source | None, capabilities: list[Capability]
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


def load_baseline(setup: Setup) -> Any:
    from tuneutils.shared.models import resolve

    given = str(setup.run.params.baseline)
    ref = resolve(given)
    if not same_tokenizer(load_tokenizer(ref), setup.tokenizer):
        raise ToolError(f"--baseline {given}: has another tokenizer than the student")
    return load(ref, setup, "as asked")


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


def baseline_facts(setup: Setup, art: Artifact) -> dict[str, Any]:
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
