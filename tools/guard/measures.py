"""Numbers about verdicts: shares with exact intervals, reliability, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tuneutils.shared.artifact import log_event
from tuneutils.shared.command import Run
from tuneutils.shared.guarding import Guard, Watch
from tuneutils.tools.guard.bounds import share
from tuneutils.tools.guard.exchanges import Exchange
from tuneutils.tools.guard.logistic import auc

BINS = 10


def flagged(guard: Guard, watch: Watch) -> bool:
    """By the joint score alone: watches made before a threshold was set count as well."""
    return watch.best_joint > guard.settings.flag_above


def summary(guard: Guard, exchanges: Sequence[Exchange], watches: Sequence[Watch]) -> dict[str, Any]:
    """Recall, false alarms and calibration of verdicts."""
    by_kind: dict[str, list[bool]] = {"failure": [], "harmless": [], "handled": []}
    for exchange, watch in zip(exchanges, watches, strict=True):
        by_kind[exchange.kind].append(flagged(guard, watch))
    scores = np.array([watch.verdict().score for watch in watches])
    failed = np.array([e.failed for e in exchanges])
    return {
        "recall": share(sum(by_kind["failure"]), len(by_kind["failure"])),
        "false_positives": share(sum(by_kind["harmless"]), len(by_kind["harmless"])),
        "handled_flagged": share(sum(by_kind["handled"]), len(by_kind["handled"])),
        "escalated_harmless": share(
            sum(w.raised for w, e in zip(watches, exchanges, strict=True) if e.kind == "harmless"),
            len(by_kind["harmless"]),
        ),
        "auc": _or_none(auc(scores, failed)),
        "ece": ece(scores, failed),
        "reliability": reliability(scores, failed),
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def reliability(scores: np.ndarray[Any, Any], failed: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Ten bins of equal count by score: mean score, observed share with its interval."""
    if not len(scores):
        return []
    order = np.argsort(scores, kind="stable")
    bins = []
    for part in np.array_split(order, min(BINS, len(order))):
        bins.append({"score": float(scores[part].mean()), **share(int(failed[part].sum()), len(part))})
    return bins


def ece(scores: np.ndarray[Any, Any], failed: np.ndarray[Any, Any]) -> float | None:
    """Expected calibration error over bins of equal count (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    bins = reliability(scores, failed)
    total = sum(b["n"] for b in bins)
    return sum(b["n"] * abs(b["score"] - b["value"]) for b in bins) / total if total else None


def latency(guard: Guard) -> dict[str, dict[str, float]]:
    """Calls, seconds and microseconds a call of each layer; for the run log, never for an artifact."""
    return {
        name: {
            "calls": guard.calls[name],
            "seconds": round(guard.seconds[name], 6),
            "us_per_call": round(1e6 * guard.seconds[name] / max(1, guard.calls[name]), 3),
        }
        for name in guard.seconds
    }


def log_run(run: Run[Any], guard: Guard, **more: Any) -> None:
    """What differs from run to run goes beside the artifact."""
    log_event(run, event="done", **more, layers=latency(guard))


def shown(found: Mapping[str, Any]) -> str:
    """``0.61 [0.52, 0.69], 61 of 100``."""
    if found["value"] is None:
        return "none to measure on"
    bounds = f"[{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f} {bounds}, {found['k']} of {found['n']}"
