"""A guard for one model, from exchanges in which it failed and others that look like them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tuneutils.shared.artifact import Artifact, describe_input, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.guarding import POOLINGS, Guard, Settings, decode, decoder_layers, save_guard
from tuneutils.shared.models import Loaded, load_model, model_input, resolve
from tuneutils.shared.records import Located, Reader, Record, dump_line
from tuneutils.tools.guard import measures
from tuneutils.tools.guard.bounds import threshold
from tuneutils.tools.guard.exchanges import (
    Exchange,
    folds,
    has_reply,
    labelled,
    outcome,
    split_groups,
    to_exchange,
)
from tuneutils.tools.guard.features import default_layers, extract
from tuneutils.tools.guard.fit import (
    Learning,
    as_rows,
    category_weights,
    choose,
    fit_joint,
    fit_text,
    probe_weights,
    text_rows,
)
from tuneutils.tools.guard.judge import judge
from tuneutils.tools.guard.params import TrainParams
from tuneutils.tools.guard.probe import ProbeReader, answered, prepared, source_input
from tuneutils.tools.guard.probe import validate as validate_probe

FORWARD_ROWS = 16


def train(run: Run[TrainParams]) -> dict[str, Any]:
    """Run ``guard train``; returns the summary."""
    params = run.params
    resolve(params.model)
    inputs = [source_input(path) for path in run.inputs]
    inputs.append(model_input(params.model))
    if params.calibration:
        inputs.append(describe_input("calibration", params.calibration))
    with run.artifact("guard", inputs) as art:
        found = ProbeReader(run, _validator(params))
        located = list(found.located())
        calibration = _calibration_records(run)
        loaded = load_model(
            params.model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
        )
        clock = Clock()
        exchanges = _exchanges(run, loaded, located, found, art)
        clock.lap("read_and_probe")
        if calibration is None:
            fit_at, hold_at = split_groups(exchanges, params.calibration_share, run.seed)
            learnt, held = [exchanges[i] for i in fit_at], [exchanges[i] for i in hold_at]
        else:
            learnt, held = exchanges, _exchanges(run, loaded, calibration, None, None)
        _require_both(learnt)
        guard, report = _learn(run, loaded, learnt)
        clock.lap("learn")
        report |= _set_threshold(run, loaded, guard, held)
        clock.lap("threshold")
        report["groups_learnt"] = sorted({e.group for e in exchanges} | {e.group for e in held})
        save_guard(guard, art.dir)
        write_json(art.dir / "training.json", report)
        art.metrics = _headline(report)
        art.licence = inputs[0].licence
        art.extra["model_guarded"] = {"path": params.model, "sha256": inputs[len(run.inputs)].sha256}
        measures.log_run(run, guard, seconds=clock.seconds)
    _say(run, report)
    return {"output": run.output, "metrics": _headline(report)}


class Clock:
    """Seconds of the parts of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 3), now


def _validator(params: TrainParams) -> Any:
    judge_label = labelled(params.label, params.fails_above)

    def judge_record(record: Record) -> None:
        if params.label not in record and not has_reply(record):
            validate_probe(record)
        else:
            judge_label(record)

    return judge_record


def _calibration_records(run: Run[TrainParams]) -> list[Located] | None:
    if not run.params.calibration:
        return None
    return list(Reader([run.params.calibration], validate=_validator(run.params)).located())


def _exchanges(
    run: Run[TrainParams],
    loaded: Loaded,
    located: Sequence[Located],
    reader: ProbeReader | None,
    art: Artifact | None,
) -> list[Exchange]:
    """The records as exchanges; probes are run on the model first and kept in ``exchanges.jsonl``."""
    params = run.params
    waiting = [i for i, item in enumerate(located) if params.label not in item.record]
    replaced: dict[int, Record] = {}
    for start in range(0, len(waiting), 4 * params.batch_size):
        some = waiting[start : start + 4 * params.batch_size]
        ready = prepared(loaded, [located[i] for i in some], params.template, _refuse(reader))
        done = answered(loaded, ready, params, run.seed, offset=start)
        for (before, _), record in zip(ready, done, strict=True):
            replaced[id(before)] = record
        run.log.info("%d of %d probes run", start + len(some), len(waiting))
    if waiting and art is not None:
        (art.dir / "exchanges.jsonl").write_bytes(b"".join(map(dump_line, replaced.values())))
    refuse = _refuse(reader)
    made = []
    for item in located:
        record = replaced.get(id(item.record), item.record)
        if params.label not in record and "label" not in record:
            continue  # a probe that was refused
        own = id(item.record) in replaced
        label, above = ("label", None) if own else (params.label, params.fails_above)
        try:
            failed, harmless = outcome(record, label, above)
            made.append(
                to_exchange(
                    record, loaded.tokenizer, params.template, params.max_length,
                    place=item.place, failed=failed, harmless=harmless,
                )
            )  # fmt: skip
        except ValueError as exc:
            refuse(item, str(exc))
    return made


def _refuse(reader: ProbeReader | None) -> Callable[[Located, str], None]:
    """What to do with a bad record: as ``--on-error`` says, or stop where it is one of --calibration."""

    def stop(item: Located, reason: str) -> None:
        raise ToolError(f"{item.place}: {reason}")

    return stop if reader is None else reader.refuse


def _require_both(exchanges: Sequence[Exchange]) -> None:
    kinds = Counter(e.kind for e in exchanges)
    for kind in ("failure", "harmless"):
        if not kinds[kind]:
            raise ToolError(
                f"no {kind} exchange among {len(exchanges)} to learn from; a guard needs both failures and "
                "harmless exchanges (guard probe makes some)"
            )


def _learn(run: Run[TrainParams], loaded: Loaded, exchanges: list[Exchange]) -> tuple[Guard, dict[str, Any]]:
    """Both layers, with nothing decided yet on when to flag."""
    params = run.params
    layers = _layers(params.layers, len(decoder_layers(loaded.model)))
    with run.progress(len(exchanges), "activations", "exchanges") as bar:
        features = extract(loaded, exchanges, layers, batch_size=FORWARD_ROWS, progress=bar.update)
    learning = Learning.of(exchanges, features, folds(exchanges, params.folds, run.seed))
    _require_folds(learning)
    poolings = POOLINGS if params.pooling == "auto" else (params.pooling,)
    choice, probe_logits, tried = choose(learning, layers, poolings)
    run.log.info(
        "probe: layer %d, %s, l2 %g: AUC %.3f out of fold",
        choice.layer,
        choice.pooling,
        choice.l2,
        choice.auc,
    )
    rows = text_rows(exchanges, features, lambda ids: decode(loaded.tokenizer, ids))
    text, text_bias, text_logits, text_report = fit_text(learning, rows)
    scale, joint = fit_joint(learning, probe_logits, text_logits)
    names, category, category_bias = category_weights(learning, choice.layer)
    weights, bias = probe_weights(learning, choice)
    settings = Settings(
        layer=choice.layer,
        pooling=choice.pooling,
        categories=names,
        raise_above=_raise_above(learning, probe_logits, params.escalate),
        flag_above=math.inf,
        probe_scale=(scale[0], scale[1]),
        joint=(joint[0], joint[1], joint[2]),
        text_bias=text_bias,
        bias=bias,
        template=params.template,
        max_length=params.max_length,
        budget=params.budget,
    )
    report = {
        "exchanges": dict(Counter(e.kind for e in exchanges)),
        "categories": dict(Counter(e.category for e in exchanges if e.failed)),
        "probe": {**dataclasses.asdict(choice), "tried": as_rows(tried)},
        "text": text_report,
        "joint": {"intercept": joint[0], "probe": joint[1], "text": joint[2]},
    }
    return Guard(settings, weights, category, category_bias, text), report


def _layers(given: str, count: int) -> list[int]:
    if given == "auto":
        return default_layers(count)
    try:
        layers = sorted({int(part) for part in given.split(",")})
    except ValueError as exc:
        raise ToolError(f"--layers {given}: write numbers such as 8,16", code=ExitCode.USAGE) from exc
    if not layers or layers[0] < 1 or layers[-1] > count:
        raise ToolError(f"--layers {given}: the model has layers 1 to {count}", code=ExitCode.USAGE)
    return layers


def _require_folds(learning: Learning) -> None:
    for fold in np.unique(learning.fold):
        learnt = learning.targets[learning.fold != fold]
        if not 0 < learnt.sum() < len(learnt):
            raise ToolError(
                "failures and harmless exchanges come from too few prompts or templates to cross-validate "
                "over; add others, or take fewer --folds or a smaller --calibration-share"
            )


def _raise_above(learning: Learning, logits: np.ndarray[Any, Any], escalate: float) -> float:
    """The out-of-fold logit that a share ``escalate`` of harmless exchanges reaches."""
    highest = logits[learning.highest(logits)]
    harmless = highest[[e.kind == "harmless" for e in learning.exchanges]]
    return float(np.quantile(harmless, 1 - escalate, method="lower"))


def _set_threshold(
    run: Run[TrainParams], loaded: Loaded, guard: Guard, held: list[Exchange]
) -> dict[str, Any]:
    """Watch the exchanges that were kept apart, and set the threshold on the harmless ones."""
    with run.progress(len(held), "threshold", "exchanges") as bar:
        watches = judge(loaded, guard, held, FORWARD_ROWS, progress=bar.update)
    scores = [w.best_joint for w in watches]
    harmless = [s for s, e in zip(scores, held, strict=True) if e.kind == "harmless"]
    found = threshold(harmless, run.params.budget)
    alone = threshold(
        [w.best_probe for w, e in zip(watches, held, strict=True) if e.kind == "harmless"], run.params.budget
    )
    # Where so few are raised that the budget is not used up, whatever is raised may be flagged.
    value = found.value if math.isfinite(found.value) else -1e9
    guard.settings = dataclasses.replace(guard.settings, flag_above=value)
    return {
        "threshold": {**dataclasses.asdict(found), "value": value},
        "probe_alone_above": alone.value,
        "calibration": measures.summary(guard, held, watches),
    }


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    calibration = report["calibration"]
    return {
        "probe_auc": report["probe"]["auc"],
        "layer": report["probe"]["layer"],
        "pooling": report["probe"]["pooling"],
        "threshold": {k: v for k, v in report["threshold"].items() if k != "value"},
        "recall": calibration["recall"],
        "ece": calibration["ece"],
    }


def _say(run: Run[TrainParams], report: dict[str, Any]) -> None:
    found = report["threshold"]
    run.log.info(
        "threshold from %d harmless exchanges: %.1f %% expected to be flagged (95 %% bound: %.1f %%)",
        found["n"], 100 * found["expected"], 100 * found["upper95"],
    )  # fmt: skip
    run.log.info("recall where nothing was learnt: %s", measures.shown(report["calibration"]["recall"]))
