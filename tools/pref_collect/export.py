"""Votes → records for training, in TRL's preference and unpaired formats.

``margin`` is the raters' mean value, in points of the seven-point scale (0 to 3, towards ``chosen``);
``strength`` is the share of raters that prefer ``chosen``, an equal or both-bad vote counting half to
each side: a soft label.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, sidecar
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Record, open_writer
from tuneutils.tools.pref_collect.params import ExportParams
from tuneutils.tools.pref_collect.votes import Votes, load_votes, prompt_key

FAIR = 4  # the middle of the rating scale
Shares = tuple[tuple[str, float], ...]


def export(run: Run[ExportParams]) -> Summary:
    """Write ``run.output`` from the study or votes of ``run.inputs``."""
    shares = parse_split(run.params.split) if run.params.split else ()
    if shares and run.output == "-":
        raise ToolError("--split writes several streams: name a folder with -o", code=ExitCode.USAGE)
    votes = load_votes(run)
    if run.params.format == "preference" and votes.mode == "rate":
        raise ToolError("ratings make no pairs; use --format unpaired", code=ExitCode.USAGE)
    if not shares:
        check_stream(run, votes.inputs)
    dropped: Counter[str] = Counter()
    rows = list(records(votes, run.params, run.seed, dropped))
    if not rows:
        raise ToolError(f"nothing to export: {_shown(dropped)}")
    metrics: dict[str, Any] = {
        "votes": len(votes.rows),
        "records": len(rows),
        "dropped": dict(sorted(dropped.items())),
    }
    if votes.simulated:
        run.log.warning("the votes are simulated; every record says so")
    _write(run, votes, rows, shares, metrics)
    run.log.info("%d votes, %d records; left out: %s", len(votes.rows), len(rows), _shown(dropped))
    return {"output": run.output, **metrics}


def _shown(dropped: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "nothing"


def _write(
    run: Run[ExportParams], votes: Votes, rows: list[Record], shares: Shares, metrics: dict[str, Any]
) -> None:
    said = {"licence": votes.licence, "source": votes.source, "simulated": votes.simulated or None}
    if not shares:
        with open_writer(str(run.output)) as writer:
            for row in rows:
                writer.write(row)
        if run.output != "-" and Path(str(run.output)).is_file():
            sidecar(run, Path(str(run.output)), votes.inputs, metrics=metrics, **said)
        return
    sides = metrics["split"] = dict.fromkeys((name for name, _ in shares), 0)
    with run.artifact("records", votes.inputs) as art, ExitStack() as stack:
        writers = {n: stack.enter_context(open_writer(art.dir / f"{n}.jsonl")) for n in sides}
        for row in rows:
            side = side_of(prompt_key(row), shares, run.seed)
            writers[side].write(row)
            sides[side] += 1
        art.metrics, art.licence, art.source = metrics, votes.licence, votes.source
        if votes.simulated:
            art.extra["simulated"] = True


def records(votes: Votes, params: ExportParams, seed: int, dropped: Counter[str]) -> Iterator[Record]:
    """The exported records in the votes' order; ``dropped`` counts what is left out, by reason."""
    if params.format == "votes":
        yield from votes.rows
        return
    for rows in by_item(votes.rows, gold=params.gold, dropped=dropped):
        if len(rows) < params.min_raters:
            dropped["items with too few raters"] += 1
        elif votes.mode == "rate":
            yield from _rated(rows, dropped)
        else:
            yield from _compared(rows, params, seed, dropped)


def by_item(rows: list[Record], *, gold: bool, dropped: Counter[str]) -> Iterator[list[Record]]:
    """The first votes of each item; repeats are for the report alone."""
    items: dict[str, list[Record]] = {}
    for row in rows:
        if row["repeat"]:
            dropped["repeated votes"] += 1
        elif row.get("gold") is not None and not gold:
            dropped["votes on gold items"] += 1
        else:
            items.setdefault(row["item"], []).append(row)
    yield from items.values()


def _about(rows: list[Record], sign: int = 1) -> Record:
    """What every exported record keeps of its votes; ``sign`` turns them towards ``chosen``."""
    votes = [
        {
            "rater": row["rater"],
            "value": sign * row["value"],
            **({"both_bad": True} if row.get("both_bad") else {}),
            **({"aspects": {k: sign * v for k, v in row["aspects"].items()}} if row["aspects"] else {}),
            **({"reason": row["reason"]} if row["reason"] else {}),
        }
        for row in rows
    ]
    simulated = {"simulated": True} if any(row["simulated"] for row in rows) else {}
    return {"item": rows[0]["item"], "votes": votes, "n_raters": len(rows), **simulated}


def _compared(rows: list[Record], params: ExportParams, seed: int, dropped: Counter[str]) -> Iterator[Record]:
    if params.both_bad == "drop" and 2 * sum(row["both_bad"] for row in rows) > len(rows):
        dropped["items called both bad"] += 1
        return
    mean = sum(row["value"] for row in rows) / len(rows)
    if mean == 0 and params.ties == "drop":
        dropped["ties"] += 1
        return
    first = mean > 0 or (mean == 0 and _point(seed, "tie", rows[0]["item"]) < 0.5)
    chosen, rejected = ("a", "b") if first else ("b", "a")
    sign = 1 if first else -1
    values = [sign * row["value"] for row in rows]
    strength = sum(1.0 if v > 0 else 0.5 if v == 0 else 0.0 for v in values) / len(rows)
    prompt, best = rows[0]["prompt"], rows[0][f"completion_{chosen}"]
    worst = rows[0][f"completion_{rejected}"]
    about = {**_about(rows, sign), "margin": abs(mean), "strength": strength}
    if params.format == "unpaired":
        yield {"prompt": prompt, "completion": best, "label": True, **about}
        yield {"prompt": prompt, "completion": worst, "label": False, **about}
        return
    yield {"prompt": prompt, "chosen": best, "rejected": worst, **about}
    if params.edited:
        yield from _edited(rows, prompt, best)


def _edited(rows: list[Record], prompt: Any, best: Any) -> Iterator[Record]:
    """A rater's own answer is better than the best there was, by that rater's word alone."""
    for row in rows:
        text = row["edited"]
        written = [{"role": "assistant", "content": text}] if isinstance(best, list) else text
        if text and written != best:
            about = {**_about([row]), "votes": [], "margin": None, "strength": 1.0, "edited_by": row["rater"]}
            yield {"prompt": prompt, "chosen": written, "rejected": best, **about}


def _rated(rows: list[Record], dropped: Counter[str]) -> Iterator[Record]:
    mean = sum(row["value"] for row in rows) / len(rows)
    if mean == FAIR:
        dropped["ties"] += 1
        return
    label = mean > FAIR
    agree = sum(
        1.0 if (v := row["value"]) != FAIR and (v > FAIR) == label else 0.5 if v == FAIR else 0.0
        for row in rows
    )
    about = {**_about(rows), "margin": abs(mean - FAIR), "strength": agree / len(rows), "rating": mean}
    yield {"prompt": rows[0]["prompt"], "completion": rows[0]["completion"], "label": label, **about}


def parse_split(text: str) -> Shares:
    """``train=0.9,test=0.1`` → pairs whose shares add up to 1.

    Raises:
        ToolError: it does not parse, a name comes twice, or the sum is not 1 (2).
    """
    pairs = []
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not name.isidentifier() or not 0 < value <= 1:
            raise ToolError(f"--split {part!r}: write NAME=SHARE with 0 < SHARE <= 1", code=ExitCode.USAGE)
        pairs.append((name, value))
    if abs(sum(share for _, share in pairs) - 1) > 1e-6 or len(dict(pairs)) != len(pairs):
        raise ToolError(f"--split {text!r}: shares must add up to 1, names differ", code=ExitCode.USAGE)
    return tuple(pairs)


def side_of(key: str, shares: Shares, seed: int) -> str:
    """The side that a prompt falls on, whatever other prompts there are."""
    point, edge = _point(seed, "split", key), 0.0
    for name, share in shares:
        edge += share
        if point < edge:
            return name
    return shares[-1][0]


def _point(*what: object) -> float:
    """A number in [0, 1) that depends on ``what`` alone."""
    digest = hashlib.sha256("\x1f".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
