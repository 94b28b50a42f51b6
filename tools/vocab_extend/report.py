"""The report of an extended vocabulary: ``report.json`` for machines, ``report.md`` for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import write_json

Report = dict[str, Any]


def shown(found: Mapping[str, Any], digits: int = 3, sign: str = "") -> str:
    """``1.234 [1.200, 1.270]``."""
    value = f"{found['value']:{sign}.{digits}f}"
    if found["low"] is None:
        return value
    return f"{value} [{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"


def headline(report: Report) -> dict[str, Any]:
    """What the manifest keeps."""
    made: dict[str, Any] = dict(report["vocabulary"])
    for name, text in report["fertility"].items():
        for side in ("before", "after"):
            made[f"{name}_tokens_per_word_{side}"] = text[side]["tokens_per_word"]["value"]
    for name, text in report["bits_per_byte"].items():
        made[f"{name}_bits_per_byte_base"] = text["base"]["value"]
        for way, found in text["inits"].items():
            made[f"{name}_bits_per_byte_{way}"] = found["bits_per_byte"]["value"]
    return made


def write_report(folder: Path, report: Report) -> None:
    """``report.json`` and ``report.md``."""
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")


def as_markdown(report: Report) -> str:
    """The report for people."""
    sizes = report["vocabulary"]
    lines = [
        "# New tokens",
        "",
        f"{sizes['new_tokens']} tokens added to {sizes['old_tokens']}; "
        f"their embeddings start by {report['init']}.",
        "",
        "| text | documents | tokens per word before | after | bytes per token before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name, text in report["fertility"].items():
        cells = [
            shown(text[s][k]) for k in ("tokens_per_word", "bytes_per_token") for s in ("before", "after")
        ]
        shown_name = f"{name} (learnt from)" if name == "records" else name
        lines.append(f"| {shown_name} | {text['documents']} | {' | '.join(cells)} |")
    for name, text in report["bits_per_byte"].items():
        lines += [
            "",
            f"Bits per byte of {name} ({text['base']['n']} documents) before any training; the base "
            f"with its old tokens: {shown(text['base'])}.",
            "",
            "| start | bits per byte | change from the base |",
            "|---|---|---|",
        ]
        for way, found in text["inits"].items():
            lines.append(f"| {way} | {shown(found['bits_per_byte'])} | {shown(found['change'], sign='+')} |")
    return "\n".join([*lines, "", "95 % bootstrap intervals over documents.", ""])
