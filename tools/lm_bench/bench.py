"""The benchmark from top to bottom: models and reports in, one report out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, Input, describe_input, portable_path, work_dir
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.tools.lm_bench import report as reports
from tuneutils.tools.lm_bench.gate import check_rises, parse_rises
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.params import Params
from tuneutils.tools.lm_bench.plot import write_plots
from tuneutils.tools.lm_bench.tradeoff import choice, choice_line, fronts, points, quality_metric


@dataclass(frozen=True)
class Entry:
    """One MODEL of the command line."""

    label: str
    path: str
    report: bool


def bench(run: Run[Params]) -> dict[str, Any]:
    """Run ``lm-bench``; returns the summary.

    Raises:
        ToolError: bad input, or a model that cannot be measured, by name.
        GateFailed: a metric rose too far; the report is written all the same.
    """
    params = run.params
    entries, baseline = _entries(run)
    limits = parse_rises(params.max_rise, params.baseline)
    fresh = [e for e in entries if not e.report]
    asked = [*params.records, *params.task, *filter(None, [params.general])]
    if fresh and not asked and not params.speed:
        raise ToolError(
            "nothing to measure: give --records, --general, --task or --speed", code=ExitCode.USAGE
        )
    if asked and not fresh:
        raise ToolError(
            f"every MODEL is a report, so {asked[0]} would measure nothing; leave it out or give models",
            code=ExitCode.USAGE,
        )
    runs = _run_logs(entries)
    inputs, measure_all = _plan(run, entries)
    try:
        with run.artifact("report", inputs) as art:
            models = measure_all()
            if params.speed:
                runs = _measure_speed(run, fresh, runs)
            report = reports.build(models, baseline, run.seed)
            _write(run, art, report, models, runs)
    except UpToDate as done:
        _check_labels(run, entries)
        report = json.loads((Path(str(run.output)) / reports.REPORT).read_text(encoding="utf-8"))
        if not params.speed or not fresh:
            check_rises(limits, report)
            raise
        runs = _measure_speed(run, fresh, runs)
        _write_run_log(work_dir(str(run.output)), runs)
        run.log.info("%s is up to date; speed measured again (%s)", run.output, done)
    _show(run, report, runs)
    check_rises(limits, report)
    line = {"choice_line": choice_line(report, runs)} if "choice" in report else {}
    return {"output": run.output, **report, "runs": runs, **line}


def _entries(run: Run[Params]) -> tuple[list[Entry], str | None]:
    """The models, the baseline among them, and the baseline's label."""
    entries = [_entry(given) for given in run.inputs]
    baseline = run.params.baseline
    if baseline is None:
        return entries, None
    labels = [label for e in entries for label in _labels(e)]
    if baseline in labels:
        return entries, baseline
    named, path = _split(baseline)
    if not Path(path).exists() and "/" not in path:
        raise ToolError(
            f"--baseline {baseline}: neither a model among {', '.join(labels)} nor a path",
            code=ExitCode.USAGE,
        )
    found = _entry(baseline)
    return [found, *entries], named


def _check_labels(run: Run[Params], entries: Sequence[Entry]) -> None:
    """Labels are no parameters, so the check for an output that is up to date does not see them."""
    report = json.loads((Path(str(run.output)) / reports.REPORT).read_text(encoding="utf-8"))
    before = [m["label"] for m in report["models"]]
    now = [label for e in entries for label in _labels(e)]
    if before != now:
        raise ToolError(
            f"{run.output}: exists with the labels {', '.join(before)}, now {', '.join(now)}; "
            "--force replaces it",
            code=ExitCode.CANNOT_WRITE,
        )


def _entry(given: str) -> Entry:
    label, path = _split(given)
    if path == "-":
        raise ToolError("a model cannot be read from stdin; name its folder", code=ExitCode.USAGE)
    return Entry(label, path, reports.is_report(path))


def _split(given: str) -> tuple[str, str]:
    """``LABEL=PATH`` in its parts; the label of a bare path is its folder's name, or its file's stem."""
    at = Path(given)
    if "=" in given and not at.exists():
        label, _, path = given.partition("=")
        return label, path
    name = at.resolve().name if at.exists() else at.name
    return (at.stem if at.is_file() else name), given


def _labels(entry: Entry) -> list[str]:
    if not entry.report:
        return [entry.label]
    models = reports.load_report(entry.path)
    return [entry.label] if len(models) == 1 else [m.label for m in models]


def _plan(run: Run[Params], entries: Sequence[Entry]) -> tuple[list[Input], Any]:
    """The manifest's inputs, and the function that measures or reads every entry."""
    if all(e.report for e in entries):
        inputs = [describe_input("report", e.path) for e in entries]
        return inputs, lambda: [m for e in entries for m in _read(e)]
    from tuneutils.shared.models import model_input
    from tuneutils.tools.lm_bench.edge import resolve_any
    from tuneutils.tools.lm_bench.measure import measure, prepare

    refs = {e.label: resolve_any(e.path) for e in entries if not e.report}
    original = _original(run, refs)
    exams, files = prepare(run)
    models = [
        describe_input("report", e.path)
        if e.report
        else describe_input("edge", e.path)
        if refs[e.label].kind == "edge"
        else model_input(e.path)
        for e in entries
    ]

    def measure_all() -> list[Measured]:
        measured: list[Measured] = []
        for entry in entries:
            measured += (
                _read(entry)
                if entry.report
                else [measure(run, entry.label, refs[entry.label], exams, original)]
            )
        return measured

    return [*models, *files], measure_all


def _original(run: Run[Params], refs: Mapping[str, Any]) -> Any:
    """The model of ``--reference``, a ``fidelity.Original``, or None."""
    from tuneutils.tools.lm_bench.fidelity import Original

    label = run.params.reference
    if label is None:
        return None
    if label not in refs or refs[label].kind == "edge":
        known = [name for name, ref in refs.items() if ref.kind != "edge"]
        raise ToolError(
            f"--reference {label}: not among the models that Transformers loads: {', '.join(known)}",
            code=ExitCode.USAGE,
        )
    if not run.params.records:
        raise ToolError("--reference: needs --records to compare on", code=ExitCode.USAGE)
    return Original(label, refs[label])


def _read(entry: Entry) -> list[Measured]:
    models = reports.load_report(entry.path)
    if len(models) == 1:
        models[0].label = entry.label
    return models


def _run_logs(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """What run logs say of time and memory, by label: of training, and of earlier speed measurements."""
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if not entry.report:
            found[entry.label] = training_log(entry.path)
            continue
        logged = {e.get("label"): e for e in _events(work_dir(entry.path) / "run.jsonl")}
        for model in _read(entry):
            earlier = logged.get(model.label) or (next(iter(logged.values())) if len(logged) == 1 else {})
            known = {k: v for k, v in (earlier or {}).items() if k not in ("label", "event")}
            found[model.label] = {**training_log(str(model.info["path"])), **known}
    return found


def training_log(path: str) -> dict[str, Any]:
    """Time and memory of a model's training, from the run log beside it; empty without one."""
    done = [e for e in _events(work_dir(path) / "run.jsonl") if e.get("event") == "done"]
    if not done:
        return {}
    last = done[-1]
    renamed = {"peak_rss_bytes": "train_peak_rss_bytes", "peak_cuda_bytes": "train_peak_cuda_bytes"}
    kept = ("train_s", "peak_rss_bytes", "peak_cuda_bytes", "tokens_per_s")
    return {renamed.get(k, k if k == "train_s" else f"train_{k}"): last[k] for k in kept if k in last}


def _events(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a run log; a last one cut off by a kill is left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _measure_speed(
    run: Run[Params], entries: Sequence[Entry], runs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    from tuneutils.tools.lm_bench.bandwidth import add_shares
    from tuneutils.tools.lm_bench.speed import measure_apart

    out = dict(runs)
    limits: list[dict[str, Any]] = []
    for entry in entries:
        found = add_shares(run, limits, lambda entry=entry: measure_apart(run, entry.label, entry.path))
        out[entry.label] = {**out.get(entry.label, {}), **found}
    return out


def _write(
    run: Run[Params],
    art: Artifact,
    report: reports.Report,
    models: Sequence[Measured],
    runs: dict[str, dict[str, Any]],
) -> None:
    for model in report["models"]:
        model["info"]["path"] = portable_path(model["info"]["path"])
    several = len(report["models"]) > 1 and report["tasks"]
    if several:
        quality = quality_metric(report, run.params.quality)
        rows = points(report, quality)
        report["pareto"] = fronts(report, quality, rows, run.params.cost)
        report["quality"] = ":".join(quality)
        report["choice"] = choice(report, quality)
        write_plots(art.dir / "plots", report, quality, rows, report["pareto"])
    reports.write(art.dir, report, models)
    for warning in report["warnings"]:
        run.log.warning("%s", warning)
    art.metrics.update(_headlines(report))
    _write_run_log(art.work, runs)
    if several and any(runs.values()):
        rows = points(report, quality, runs)
        write_plots(art.work / "plots", report, quality, rows, fronts(report, quality, rows, run.params.cost))


def _headlines(report: reports.Report) -> dict[str, Any]:
    """``{label: {task: {metric: value, low, high, n}}}`` for the manifest."""
    return {
        m["label"]: {
            task: {
                name: {k: found[k] for k in ("value", "low", "high", "n")} for name, found in metrics.items()
            }
            for task, metrics in m["results"].items()
        }
        for m in report["models"]
    }


def _write_run_log(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    if not any(runs.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"event": "costs", "label": label, **costs}) for label, costs in runs.items() if costs
    ]
    (folder / "run.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def flat(costs: dict[str, Any]) -> dict[str, Any]:
    """Costs for a table: the rates of each shape as columns such as ``decode_tokens_per_s@256x8``."""
    out = {k: v for k, v in costs.items() if k != "speed"}
    for row in costs.get("speed", []):
        shape = f"@{row['prompt']}x{row['batch']}"
        out.update({k + shape: v for k, v in row.items() if k not in ("prompt", "batch")})
    return out


def _show(run: Run[Params], report: reports.Report, runs: dict[str, dict[str, Any]]) -> None:
    """The table for people on stderr, and the CSV where it is asked for."""
    import click

    if run.params.csv is not None:
        rows = [{**row, **flat(runs.get(row["label"], {}))} for row in reports.table(report)]
        text = reports.to_csv(rows)
        if run.params.csv == "-":
            if run.json:
                raise ToolError("--json and --csv - cannot both go to stdout", code=ExitCode.USAGE)
            sys.stdout.write(text)
        else:
            Path(run.params.csv).write_text(text, encoding="utf-8")
    if not run.quiet:
        click.echo(reports.to_text(report, runs), err=True)
        if "choice" in report:
            click.echo(choice_line(report, runs), err=True)
