"""``--max-rise TASK:METRIC=SHARE``: no model may lie further above the baseline than that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuneutils.shared.errors import ExitCode, GateFailed, ToolError, nearest


def parse_rises(given: Sequence[str], baseline: str | None) -> dict[str, float]:
    """``{"heldout:perplexity": 0.02}`` of ``heldout:perplexity=0.02``.

    Raises:
        ToolError: no share, or no baseline to rise from (2).
    """
    made = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not name or not (0 <= share < math.inf):
            raise ToolError(
                f"--max-rise {text}: write TASK:METRIC=SHARE, e.g. heldout:perplexity=0.02",
                code=ExitCode.USAGE,
            )
        made[name] = share
    if made and baseline is None:
        raise ToolError(f"--max-rise {given[0]}: needs --baseline, from which to rise", code=ExitCode.USAGE)
    return made


def check_rises(limits: Mapping[str, float], report: Mapping[str, Any]) -> None:
    """Compare each model's metric with the baseline's.

    Raises:
        ToolError: no such metric (2).
        GateFailed: which rose by more than its share (1).
    """
    known = [f"{task}:{metric}" for task, found in report["tasks"].items() for metric in found["metrics"]]
    models = {m["label"]: m["results"] for m in report["models"]}
    failures = []
    for name, share in limits.items():
        if name not in known:
            raise ToolError(f"--max-rise {name}: no such metric{nearest(name, known)}", code=ExitCode.USAGE)
        task, _, metric = name.rpartition(":")
        before = models[report["baseline"]][task][metric]["value"]
        for label, results in models.items():
            if task not in results:
                failures.append(f"{label}: {name} was not measured")
            elif not (value := results[task][metric]["value"]) <= (1 + share) * before:
                rise = value / before - 1 if before else math.inf
                failures.append(f"{label}: {name} rises by {100 * rise:.2f} %, over {100 * share:g} %")
    if failures:
        raise GateFailed("; ".join(failures))
