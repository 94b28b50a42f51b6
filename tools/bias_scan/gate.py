"""``--fail-above AXIS.SCORE=VALUE``: the answer no (exit 1) for scripts and pipelines."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuneutils.shared.errors import ExitCode, GateFailed, ToolError, nearest
from tuneutils.tools.bias_scan.report import Score


def parse_gates(given: Sequence[str]) -> dict[str, float]:
    """``{"gender.genbit": 0.5}``; call it before the work.

    Raises:
        ToolError: one is no ``AXIS.SCORE=VALUE`` (2).
    """
    gates = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if not equals or "." not in name or not math.isfinite(limit):
            raise ToolError(
                f"--fail-above {text}: must be AXIS.SCORE=VALUE, e.g. gender.genbit=0.5", code=ExitCode.USAGE
            )
        gates[name] = limit
    return gates


def check_gates(gates: dict[str, float], scores: Sequence[Score]) -> None:
    """Fail when a named score is above its limit, or has no value: nothing measured is nothing shown.

    ``gender.share`` names the scores of all groups, ``gender.female.share`` one.

    Raises:
        ToolError: no score has that name (2).
        GateFailed: which scores are above (1).
    """
    failures = []
    known = {s.name for s in scores} | {f"{s.axis}.{s.metric}" for s in scores}
    for name, limit in gates.items():
        if name not in known:
            raise ToolError(
                f"--fail-above {name}: no such score{nearest(name, known)}; report.json names all",
                code=ExitCode.USAGE,
            )
        for score in scores:
            if name in (score.name, f"{score.axis}.{score.metric}"):
                if score.value is None:
                    failures.append(f"{score.name} has no value ({score.note or f'n={score.n}'})")
                elif score.value > limit:
                    failures.append(f"{score.name} = {score.value:.4g} is above {limit:g}")
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise GateFailed("; ".join(failures[:3]) + more)
