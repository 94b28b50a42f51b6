"""From what policies answered to a report: estimates, win rates, the best-of-n curve, texts side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.artifact import write_json
from tuneutils.shared.evaluate import Estimate, paired_difference, ratio_estimate
from tuneutils.shared.records import open_writer
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.rewards import Episode

Report = dict[str, Any]
REPORT, ITEMS, TEXT, FRONTIER = "report.json", "items.jsonl", "report.md", "frontier.csv"


@dataclass
class Answers:
    """What one policy did.

    Attributes:
        episodes: one answer a prompt.
        kl: of each answer, ``log π(answer) − log π_first(answer)`` in nats.
        scores: by the name of the reward (``reward``, ``gold``), one a prompt.
        general: ``{"nll", "tokens", "bytes"}`` of each general text.
    """

    label: str
    episodes: list[Episode]
    kl: list[float]
    scores: dict[str, list[float]] = field(default_factory=dict)
    general: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Compared:
    """All that was measured; ``best_of``: scores ``(prompts, N)`` by the name of the reward."""

    prompts: list[Prompt]
    answers: list[Answers]
    best_of: dict[str, list[list[float]]]


def build(made: Compared, seed: int) -> Report:
    """All estimates, each with its 95 % bootstrap interval over prompts; differences are paired."""
    first = made.answers[0]
    rewards = list(first.scores)
    policies = []
    for one in made.answers:
        row: Report = {"label": one.label}
        for name in rewards:
            row[name] = ratio_estimate(one.scores[name], seed=seed).as_json()
        row["kl"] = ratio_estimate(one.kl, seed=seed).as_json()
        row["tokens"] = ratio_estimate([len(e.response_ids) for e in one.episodes], seed=seed).as_json()
        row["finished"] = ratio_estimate([float(e.finished) for e in one.episodes], seed=seed).as_json()
        if one.general:
            row["bits_per_byte"] = _bits(one.general, seed).as_json()
        if one is not first:
            row["against_first"] = _against(one, first, rewards, seed)
        policies.append(row)
    report: Report = {
        "prompts": len(made.prompts),
        "first": first.label,
        "rewards": rewards,
        "policies": policies,
        "interval": "95 % percentile bootstrap over prompts, paired for differences",
        "seed": seed,
    }
    if made.best_of:
        report["best_of_n"] = best_of_n(made.best_of, seed)
    if len(rewards) > 1:
        report["correlation"] = _correlation(*(first.scores[name] for name in rewards))
    return report


def _bits(items: Sequence[dict[str, float]], seed: int) -> Estimate:
    return ratio_estimate([i["nll"] for i in items], [math.log(2) * i["bytes"] for i in items], seed=seed)


def _against(one: Answers, first: Answers, rewards: Sequence[str], seed: int) -> Report:
    """Paired differences from the first policy, and how often an answer beats its: a tie counts half."""
    made: Report = {}
    for name in rewards:
        ours, theirs = one.scores[name], first.scores[name]
        made[name] = paired_difference(ours, theirs, seed=seed).as_json()
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]
        made[f"{name}_win_rate"] = ratio_estimate(wins, seed=seed).as_json()
    if one.general:
        nll = ([i["nll"] for i in x.general] for x in (one, first))
        size = [math.log(2) * i["bytes"] for i in one.general]
        made["bits_per_byte"] = paired_difference(*nll, size, size, seed=seed).as_json()
    return made


def _correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's correlation of two rewards on the first policy's answers; None where one is constant."""
    if np.std(a) == 0 or np.std(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def best_of_n(scores: dict[str, list[list[float]]], seed: int) -> list[Report]:
    """Reward, and gold reward, of the best by reward of n answers, for n = 1, 2, 4, … up to all N.

    Every subset of n of the N answers counts: the i-th smallest is the best of ``C(i-1, n-1)`` of the
    ``C(N, n)`` subsets (an unbiased estimator; Nakano et al. 2021, arXiv 2112.09332, appendix I). The KL is
    ``log n − (n−1)/n``, an upper bound that is reached without ties (Beirami et al. 2024, arXiv 2401.01879).
    """
    picked_by = scores["reward"]
    total = len(picked_by[0])
    made = []
    for n in [*(2**k for k in range(total.bit_length()) if 2**k < total), total]:
        weights = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
        row: Report = {"n": n, "kl": math.log(n) - (n - 1) / n}
        for name, values in scores.items():
            best = [
                float(weights @ _worth(np.asarray(by), np.asarray(of)))
                for of, by in zip(values, picked_by, strict=True)
            ]
            row[name] = ratio_estimate(best, seed=seed).as_json()
        made.append(row)
    return made


def _worth(picked_by: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values in the order of the scores that pick; equals share the mean of theirs."""
    order = np.argsort(picked_by, kind="stable")
    _, group = np.unique(picked_by[order], return_inverse=True)
    made: NDArray[np.float64] = (np.bincount(group, values[order]) / np.bincount(group))[group]
    return made


def over_optimised(row: Report) -> str | None:
    """What the two rewards together say of a policy, or None without a gold reward."""
    found = row.get("against_first", {})
    if "gold" not in found:
        return None
    reward, gold = found["reward"], found["gold"]
    if reward["low"] is None or gold["low"] is None:
        return None
    if reward["low"] > 0 and gold["high"] < 0:
        return "over-optimised: the reward rose and the gold reward fell"
    if gold["low"] > 0:
        return "better by the gold reward"
    if gold["high"] < 0:
        return "worse by the gold reward"
    return "no difference in the gold reward is shown"


def metrics(report: Report) -> Report:
    """What a manifest keeps of a report."""
    made: Report = {"prompts": report["prompts"]}
    for row in report["policies"]:
        for name, found in row.get("against_first", {}).items():
            made[f"{row['label']}_{name}"] = found
        made[f"{row['label']}_kl"] = row["kl"]
    return made


def write(folder: Path, report: Report, made: Compared, samples: int, log: Logger) -> None:
    """The report's files."""
    write_json(folder / REPORT, report)
    (folder / TEXT).write_text(to_markdown(report, made, samples), encoding="utf-8")
    with open_writer(folder / ITEMS) as writer:
        for one in made.answers:
            for i, episode in enumerate(one.episodes):
                row = {"policy": one.label, "prompt": episode.prompt.text, "completion": episode.completion}
                row |= {"tokens": len(episode.response_ids), "finished": episode.finished, "kl": one.kl[i]}
                writer.write(row | {name: values[i] for name, values in one.scores.items()})
    (folder / FRONTIER).write_text(_frontier(report), encoding="utf-8")
    plot(report, folder / "frontier.png", log)


def _frontier(report: Report) -> str:
    """CSV with a line a point: policies and best-of-n, KL against each reward with its interval."""
    lines = ["series,label,kl,reward,value,low,high"]
    rows = [("policy", row["label"], row["kl"]["value"], row) for row in report["policies"]]
    rows += [("best-of-n", row["n"], row["kl"], row) for row in report.get("best_of_n", [])]
    for series, label, kl, row in rows:
        for name in report["rewards"]:
            found = (row[name][k] for k in ("value", "low", "high"))
            numbers = ",".join("" if v is None else f"{v:.8g}" for v in found)
            lines.append(f"{series},{label},{kl:.8g},{name},{numbers}")
    return "\n".join(lines) + "\n"


def shown(found: Report, *, signed: bool = False) -> str:
    """``1.234 [1.200, 1.270]``."""
    sign = "+" if signed else ""
    if found["low"] is None:
        return f"{found['value']:{sign}.3f}"
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _table(report: Report) -> list[list[str]]:
    rewards = report["rewards"]
    general = "bits_per_byte" in report["policies"][0]
    header = ["policy", *rewards, *(f"{r} gain" for r in rewards), *(f"{r} win rate" for r in rewards)]
    header += ["KL", "tokens", "ends", *(["bits/byte", "forgetting"] if general else [])]
    rows = [header]
    for row in report["policies"]:
        against = row.get("against_first", {})
        cells = [row["label"], *(shown(row[r]) for r in rewards)]
        cells += [shown(against[r], signed=True) if against else "" for r in rewards]
        cells += [shown(against[f"{r}_win_rate"]) if against else "" for r in rewards]
        cells += [shown(row["kl"]), f"{row['tokens']['value']:.1f}", f"{row['finished']['value']:.0%}"]
        if general:
            cells.append(f"{row['bits_per_byte']['value']:.3f}")
            cells.append(shown(against["bits_per_byte"], signed=True) if against else "")
        rows.append(cells)
    return rows


def to_text(report: Report) -> str:
    """The table for a terminal, one line a policy and number."""
    header, *rows = _table(report)
    lines = [f"{report['prompts']} prompts; differences and win rates against {report['first']}"]
    for row in rows:
        lines += [
            f"{row[0]}: " + ", ".join(f"{h} {c}" for h, c in zip(header[1:], row[1:], strict=True) if c)
        ]
    lines += [f"{row['label']}: {said}" for row in report["policies"] if (said := over_optimised(row))]
    return "\n".join(lines)


def to_markdown(report: Report, made: Compared, samples: int) -> str:
    """The report for people."""
    header, *rows = _table(report)
    lines = ["# Policies compared", ""]
    lines += [f"{report['prompts']} prompts. Gains, win rates (a tie counts half) and KL are against "]
    lines[-1] += f"`{report['first']}`; intervals: {report['interval']}, seed {report['seed']}."
    lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += [""]
    lines += [f"- {row['label']}: {said}." for row in report["policies"] if (said := over_optimised(row))]
    if report.get("correlation") is not None:
        lines.append(f"- reward and gold reward correlate by {report['correlation']:.2f} on its answers.")
    if "best_of_n" in report:
        rewards = report["rewards"]
        lines += ["", f"## Best of n answers of {report['first']}, picked by the reward", ""]
        lines += ["| n | KL | " + " | ".join(rewards) + " |", "|---" * (2 + len(rewards)) + "|"]
        for row in report["best_of_n"]:
            cells = [str(row["n"]), f"{row['kl']:.3f}", *(shown(row[r]) for r in rewards)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "![reward against KL](frontier.png)", "", "## Answers side by side", ""]
    for i, prompt in enumerate(made.prompts[:samples]):
        lines += [f"### {_inline(prompt.text)}", ""]
        for one in made.answers:
            scores = ", ".join(f"{name} {values[i]:+.2f}" for name, values in one.scores.items())
            lines += [f"**{one.label}** ({scores})", "", _quoted(one.episodes[i].completion), ""]
    return "\n".join(lines).rstrip() + "\n"


def _inline(text: str) -> str:
    return _escaped(" ".join(text.split()))[:200]


def _escaped(text: str) -> str:
    """Markdown and HTML in a model's words must not become part of the page."""
    for mark in "\\`*_[]#|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _quoted(text: str) -> str:
    return "\n".join("> " + _escaped(line) for line in (text.strip() or "(nothing)").splitlines())


def plot(report: Report, path: Path, log: Logger) -> None:
    """Each reward against KL: the policies with their intervals, and best-of-n as a line."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        log.warning("no plot: matplotlib is not installed (pip install 'tuneutils[plots]')")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {"figure.dpi": 110, "font.family": "DejaVu Sans", "font.size": 8}
    with plt.rc_context(style | {"axes.grid": True, "grid.alpha": 0.3}):
        rewards = report["rewards"]
        figure, axes = plt.subplots(
            1, len(rewards), figsize=(4.5 * len(rewards), 3.5), squeeze=False, layout="constrained"
        )
        for axis, name in zip(axes[0], rewards, strict=True):
            curve = report.get("best_of_n", [])
            if curve:
                axis.plot(
                    [r["kl"] for r in curve], [r[name]["value"] for r in curve], ".-", label="best of n"
                )
            for row in report["policies"]:
                found = row[name]
                spread = None
                if found["low"] is not None:
                    spread = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
                axis.errorbar(
                    row["kl"]["value"], found["value"], yerr=spread, marker="o", capsize=2, label=row["label"]
                )
            axis.set_xlabel(f"KL from {report['first']} (nats an answer)")
            axis.set_title(name, fontsize=8)
        axes[0][0].legend(fontsize=7)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
