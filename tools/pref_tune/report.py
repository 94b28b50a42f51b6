"""The report of an alignment: ``report.json`` for machines, ``report.md`` for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json
from tuneutils.shared.command import Run
from tuneutils.shared.records import open_writer
from tuneutils.tools.pref_tune.measures import Answers

Report = dict[str, Any]
SHOWN = 5

#: section → field → how it is called
ROWS: dict[str, dict[str, str]] = {
    "pairs": {
        "accuracy": "pairs whose chosen answer has the higher reward",
        "margin": "reward of chosen less that of rejected",
        "reward_chosen": "reward of chosen",
        "reward_rejected": "reward of rejected",
        "logratio_chosen": "log-probability of chosen, change in nats",
        "logratio_rejected": "log-probability of rejected, change in nats",
        "logprob_accuracy": "pairs whose chosen answer is likelier per token",
        "logprob_accuracy_reference": "the same, by the reference",
        "logprob_accuracy_gain": "difference",
    },
    "labelled": {"margin": "reward of good answers less that of bad ones"},
    "answers": {
        "kl": "KL from the reference, nats an answer",
        "kl_per_token": "KL from the reference, nats a token",
        "win_rate": "win rate against the reference's answers",
        "score_gain": "score above the reference's answers",
    },
    "general": {
        "perplexity": "perplexity",
        "perplexity_reference": "perplexity of the reference",
        "perplexity_rise": "rise of perplexity, as a share",
        "bits_per_byte_rise": "rise in bits per byte",
    },
}
HEAD = {
    "pairs": ("accuracy", "margin", "logprob_accuracy_gain"),
    "labelled": ("margin",),
    "answers": ("kl", "win_rate"),
    "general": ("perplexity_rise",),
}


def headline(report: Report) -> Report:
    """What a manifest keeps of a report."""
    made: Report = {}
    for section, names in HEAD.items():
        for name in names:
            if name in report.get(section, {}):
                made[f"{section}_{name}"] = report[section][name]
    return made


def shown(found: Report, digits: int = 3) -> str:
    """``1.234 [1.200, 1.270]``."""
    if found["low"] is None:
        return f"{found['value']:.{digits}f}"
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def say(run: Run[Any], report: Report) -> None:
    """The numbers that matter, a line a section."""
    for section, names in HEAD.items():
        found = report.get(section)
        if found:
            parts = [f"{name} {shown(found[name])}" for name in names if name in found]
            run.log.info("%s: %s", _title(section, found), ", ".join(parts) or "one label only")


def _title(section: str, found: Report) -> str:
    counts = {
        "pairs": "held-out pairs (n = {pairs} of {prompts} prompts)",
        "labelled": "held-out labelled answers (n = {answers}, {good} good)",
        "answers": "answers to held-out prompts (n = {prompts}, judged by {judge})",
        "general": "general text (n = {texts} texts, {tokens} tokens)",
    }
    return counts[section].format(**found)


def write_report(folder: Path, report: Report, answers: Answers | None) -> None:
    """The report's files."""
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(to_markdown(report, answers), encoding="utf-8")
    if answers is None:
        return
    with open_writer(folder / "answers.jsonl") as writer:
        for i, prompt in enumerate(answers.prompts):
            row = {"prompt": prompt, "policy": answers.policy[i].text, "kl": answers.kl[i]}
            row |= {"reference": answers.reference[i].text}
            writer.write(row | {"score": answers.scores[0][i], "score_reference": answers.scores[1][i]})


def to_markdown(report: Report, answers: Answers | None) -> str:
    """The report for people."""
    lines = [f"# Alignment by {report['loss']}, β = {report['beta']:g}", ""]
    lines += [f"Intervals: {report['interval']}, seed {report['seed']}. One training run.", ""]
    for section, names in ROWS.items():
        found = report.get(section)
        if not found:
            continue
        lines += [f"## {_title(section, found).capitalize()}", "", "| | value |", "|---|---|"]
        lines += [f"| {label} | {shown(found[name])} |" for name, label in names.items() if name in found]
        if section == "labelled" and "ranked_right" in found:
            lines += [f"| (good, bad) pairs ranked right | {found['ranked_right']:.3f} |"]
        if section == "answers":
            for side in ("policy", "reference"):
                length, ends = found[f"tokens_{side}"], found[f"finished_{side}"]
                lines += [f"| {side}: tokens an answer, ended by itself | {length:.1f}, {ends:.0%} |"]
            if found["judge"] == "implicit reward":
                lines += [
                    "",
                    "The implicit reward is what was trained: it favours the policy by construction,",
                ]
                lines += ["and is no evidence of better answers. `-r` takes a reward model as judge."]
        lines += [""]
    if answers is not None:
        lines += ["## Answers side by side", ""]
        for i, prompt in enumerate(answers.prompts[:SHOWN]):
            lines += [f"**{_inline(prompt)}**", ""]
            for side in ("reference", "policy"):
                lines += [f"{side}:", "", _quoted(getattr(answers, side)[i].text), ""]
    return "\n".join(lines).rstrip() + "\n"


def _inline(text: str) -> str:
    return _escaped(" ".join(text.split())[-200:])


def _escaped(text: str) -> str:
    """Markdown and HTML in a model's words must not become part of the page."""
    for mark in "\\`*_[]#|":
        text = text.replace(mark, "\\" + mark)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _quoted(text: str) -> str:
    return "\n".join("> " + _escaped(line) for line in (text.strip() or "(nothing)").splitlines())
