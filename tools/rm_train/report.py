"""The evaluation of a reward model: ``report.json``, and plots for people and for DVC."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.artifact import write_json
from tuneutils.shared.command import Run
from tuneutils.shared.reward_model import RewardModel
from tuneutils.tools.rm_train import measures
from tuneutils.tools.rm_train.scored import Scored

AGREEMENT_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
Pool = tuple[Sequence[float], Sequence[float] | None]


def measure(
    rm: RewardModel,
    held: Mapping[str, Scored],
    *,
    learnt: Scored | None = None,
    pools: Sequence[Pool] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        held: held-out pairs by the name of their split; the numbers are of all of them together.
        learnt: pairs that were learnt from, shown beside the splits.
        pools: scores, and what they are worth, of each prompt's candidates, for the best-of-n curve.
    """
    splits = {**({"train": learnt} if learnt else {}), **held}
    report: dict[str, Any] = {
        "normalisation": {"mean": rm.mean, "std": rm.std},
        "by_split": {name: _accuracy(one, seed) for name, one in splits.items()},
    }
    pairs = [p for one in held.values() for p in one.pairs]
    if pairs:
        chosen = np.concatenate([one.chosen for one in held.values()])
        rejected = np.concatenate([one.rejected for one in held.values()])
        report |= _of_pairs(rm, Scored(pairs, chosen, rejected), seed)
        pools = [*pools, *pools_of(rm, Scored(pairs, chosen, rejected))]
    if pools:
        report["best_of_n"] = measures.best_of_n_curve(pools, seed)
    return report


def _accuracy(one: Scored, seed: int) -> dict[str, Any] | None:
    hits = measures.correct(one.difference, [p.target for p in one.pairs])
    decided = np.flatnonzero(np.isfinite(hits))
    if not len(decided):
        return None
    return measures.estimate(hits[decided], [one.pairs[i].key for i in decided], seed)


def _of_pairs(rm: RewardModel, one: Scored, seed: int) -> dict[str, Any]:
    pairs, difference = one.pairs, one.difference
    keys = [p.key for p in pairs]
    targets = np.array([p.target for p in pairs])
    hits = measures.correct(difference, targets)
    bins, ece = measures.reliability(difference, targets, keys, seed)
    sizes = np.abs(difference)
    voted = np.array([max(p.target, 1 - p.target) if p.has_share else np.nan for p in pairs])
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "prompts": len(set(keys)),
        "ties": int(np.isnan(hits).sum()),
        "accuracy": _accuracy(one, seed),
        "nll": measures.estimate(measures.cross_entropy(difference, targets), keys, seed),
        "ece": ece,
        "calibration": bins,
        "by_difference": measures.by_bin(hits, sizes, measures.quantile_edges(sizes), keys, seed),
        "by_agreement": measures.by_bin(hits, voted, AGREEMENT_EDGES, keys, seed),
        "length": _length(rm, one, hits, seed),
        "scores": {
            side: {"mean": float(np.mean(values)), "std": float(np.std(values))}
            for side, values in (
                ("chosen", (one.chosen - rm.mean) / rm.std),
                ("rejected", (one.rejected - rm.mean) / rm.std),
            )
        },
    }
    if any(p.group is not None for p in pairs):
        report["by_group"] = _by_group(one, seed)
    found = measures.human_ceiling([p.votes for p in pairs], difference, keys, seed)
    report["human_ceiling"] = found or "unknown: no record has the votes of several raters"
    return report


def _by_group(one: Scored, seed: int) -> dict[str, Any]:
    at: dict[str, list[int]] = defaultdict(list)
    for i, pair in enumerate(one.pairs):
        at[str(pair.group)].append(i)
    return {
        name: _accuracy(Scored([one.pairs[i] for i in rows], one.chosen[rows], one.rejected[rows]), seed)
        for name, rows in sorted(at.items())
    }


def _length(rm: RewardModel, one: Scored, hits: Any, seed: int) -> dict[str, Any]:
    """How scores go with the completions' lengths in tokens, and how far length alone would go."""
    pairs = one.pairs
    texts = [(p.key, t) for p in pairs for t in (p.chosen, p.rejected)]
    scores = (np.stack([one.chosen, one.rejected], axis=1).reshape(-1) - rm.mean) / rm.std
    keys = [key for key, _ in texts]
    longer = np.array([np.sign(p.chosen.completion - p.rejected.completion) for p in pairs], dtype=np.float64)
    towards = np.array([np.sign(p.target - 0.5) for p in pairs])
    preferred = longer * towards  # 1 where what is preferred is the longer
    made = measures.correlations(scores, [t.completion for _, t in texts], keys, seed)
    decided = np.isfinite(hits)
    baseline = np.flatnonzero(decided)
    if len(baseline):
        cluster = [pairs[i].key for i in baseline]
        made["longer_wins"] = measures.estimate(0.5 * (1 + preferred[baseline]), cluster, seed)
    for name, which in (
        ("accuracy_preferred_longer", preferred > 0),
        ("accuracy_preferred_shorter", preferred < 0),
    ):
        rows = np.flatnonzero(decided & which)
        if len(rows):
            made[name] = measures.estimate(hits[rows], [pairs[i].key for i in rows], seed)
    return made


def pools_of(rm: RewardModel, one: Scored) -> list[Pool]:
    """Each prompt's different completions: scores, and the share of their comparisons that they won."""
    found: dict[str, dict[tuple[int, ...], tuple[float, list[float]]]] = defaultdict(dict)
    for pair, chosen, rejected in zip(one.pairs, one.chosen, one.rejected, strict=True):
        for text, score, won in (
            (pair.chosen, chosen, pair.target),
            (pair.rejected, rejected, 1 - pair.target),
        ):
            _, wins = found[pair.key].setdefault(tuple(text.ids), ((score - rm.mean) / rm.std, []))
            wins.append(won)
    return [
        ([float(s) for s, _ in texts.values()], [float(np.mean(w)) for _, w in texts.values()])
        for texts in found.values()
    ]


def write_report(run: Run[Any], folder: Path, report: Mapping[str, Any], scored: Sequence[Scored]) -> None:
    """``report.json``, plots as JSON and, where matplotlib is installed, as a picture."""
    write_json(folder / "report.json", dict(report))
    plots = folder / "plots"
    plots.mkdir()
    write_json(plots / "calibration.json", report.get("calibration", []))
    write_json(plots / "best_of_n.json", [_flat(p) for p in report.get("best_of_n", [])])
    write_json(plots / "by_difference.json", [_flat(p) for p in report.get("by_difference", [])])
    try:
        import matplotlib  # noqa: F401 - is it there?
    except ModuleNotFoundError:
        run.log.warning("no picture: matplotlib is not installed (pip install 'tuneutils[plots]')")
        return
    from tuneutils.tools.rm_train.plots import draw

    draw(report, scored, folder / "evaluation.png")


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates as columns of their own: ``accuracy``, ``accuracy_low``, ``accuracy_high``."""
    made: dict[str, Any] = {}
    for name, value in point.items():
        if isinstance(value, dict):
            made |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            made[name] = value
    return made


def say(run: Run[Any], report: Mapping[str, Any]) -> None:
    """The headline on stderr."""
    for name, found in report["by_split"].items():
        if found:
            run.log.info("accuracy on %s: %s", name, shown(found))
    if "ece" in report:
        run.log.info("calibration error %s", shown(report["ece"]))
    if (length := report.get("length", {})).get("longer_wins"):
        run.log.info("the longer one wins: %s", shown(length["longer_wins"]))
    if isinstance(ceiling := report.get("human_ceiling"), dict):
        run.log.info(
            "a rater agrees with the others' majority: %s; the model: %s",
            shown(ceiling["rater"]),
            shown(ceiling["model"]),
        )


def shown(found: Mapping[str, Any]) -> str:
    """``0.612 [0.520, 0.690], n 120``."""
    bounds = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f}{bounds}, n {found['n']}"


def headline(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that the manifest repeats."""
    made = {k: report[k] for k in ("accuracy", "nll", "ece", "human_ceiling") if report.get(k)}
    made |= {f"accuracy_{name}": found for name, found in report["by_split"].items() if found}
    if "length" in report:
        made |= {f"length_{k}": v for k, v in report["length"].items() if k in ("pearson", "longer_wins")}
    return made
