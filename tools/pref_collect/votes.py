"""Votes: one answer of one rater each, from a database or from a stream of them.

The record of a vote::

    item, prompt, completion_a, completion_b   what was compared (or prompt, completion)
    rater, simulated                           who
    value       -3 (B much better) … 3 (A much better); to rate, 1 … 7
    both_bad    chosen instead of a point of the scale; value is then 0
    left        the completion on the left: "a" or "b" (to compare)
    aspects     name → value on the same scale
    reason, edited, repeat, gold, seconds, extra
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import STREAM_SUFFIXES, Reader, Record, dump_line
from tuneutils.tools.pref_collect.candidates import as_text, candidate_of
from tuneutils.tools.pref_collect.db import (
    Answer,
    Assignment,
    Item,
    Rater,
    Study,
    database_errors,
    database_url,
    open_engine,
    shown,
)
from tuneutils.tools.pref_collect.forms import BOTH_BAD


@dataclass(frozen=True)
class Votes:
    """The votes of a study in a fixed order, with what they came from.

    Attributes:
        mode: ``compare`` or ``rate``.
        inputs: the votes themselves, and the candidates behind them.
    """

    rows: list[Record]
    mode: str
    inputs: list[Input] = field(default_factory=list)

    @property
    def simulated(self) -> bool:
        return any(row["simulated"] for row in self.rows)

    @property
    def licence(self) -> str | None:
        return next((i.licence for i in self.inputs if i.licence), None)

    @property
    def source(self) -> str | None:
        return next((i.source for i in self.inputs if i.source), None)


def load_votes(run: Run[Any]) -> Votes:
    """The votes of the run's input.

    Raises:
        ToolError: nothing there (66), no study or votes (65), or no answers yet (65).
    """
    given = run.inputs[0]
    if "://" in given or (given != "-" and _is_sqlite(Path(given))):
        return votes_of_database(given)
    return votes_of_stream(run, given)


def _is_sqlite(path: Path) -> bool:
    if path.name.endswith(STREAM_SUFFIXES) or not path.is_file():
        return path.suffix in (".db", ".sqlite", ".sqlite3")
    with open(path, "rb") as stream:
        return stream.read(16) == b"SQLite format 3\x00"


def votes_of_database(given: str) -> Votes:
    engine = open_engine(given)
    name = shown(database_url(given))
    with database_errors(database_url(given)), Session(engine) as session:
        study = session.scalar(select(Study))
        if study is None:
            raise ToolError(f"{name}: holds no study yet; start one with pref-collect serve")
        rows = rows_of(session)
        mode = study.settings["mode"]
        inputs = [Input(**entry) for entry in study.inputs]
    engine.dispose()
    if not rows:
        raise ToolError(f"{name}: no answers yet")
    digest = hashlib.sha256(b"".join(dump_line(row) for row in rows)).hexdigest()
    return Votes(rows, mode, [Input("votes", name, digest, kind="votes"), *inputs])


def rows_of(session: Session) -> list[Record]:
    """Every answer that was not withdrawn, by item, then rater."""
    found = session.execute(
        select(Answer, Assignment, Item, Rater)
        .join(Assignment, Answer.assignment_id == Assignment.id)
        .join(Item, Assignment.item_id == Item.id)
        .join(Rater, Assignment.rater_id == Rater.id)
        .where(~Answer.withdrawn)
        .order_by(Item.position, Rater.name, Assignment.repeat)
    )
    return [_row(answer, assignment, item, rater) for answer, assignment, item, rater in found]


def _row(answer: Answer, assignment: Assignment, item: Item, rater: Rater) -> Record:
    response, compares = answer.response, "b" in item.content
    sign = -1 if assignment.swapped else 1
    both_bad = response["choice"] == BOTH_BAD
    value = 0 if both_bad else sign * response["choice"]
    shown_fields: Record = {"prompt": item.content["prompt"]}
    if compares:
        shown_fields |= {"completion_a": item.content["a"], "completion_b": item.content["b"]}
    else:
        shown_fields |= {"completion": item.content["a"]}
    return {
        "item": item.key,
        **shown_fields,
        "rater": rater.name,
        "value": value,
        **({"both_bad": both_bad, "left": "b" if assignment.swapped else "a"} if compares else {}),
        "aspects": {name: sign * v for name, v in response["aspects"].items()},
        "reason": response["reason"],
        "edited": response["edited"],
        "repeat": assignment.repeat,
        "gold": item.gold,
        "seconds": answer.seconds,
        "simulated": rater.simulated,
        "extra": item.extra,
    }


def votes_of_stream(run: Run[Any], given: str) -> Votes:
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader([given], on_error=run.on_error, quarantine=quarantine, validate=check_vote)
    rows = list(reader)
    modes = {"compare" if "completion_a" in row else "rate" for row in rows}
    if len(modes) > 1:
        raise ToolError(f"{given}: holds both comparisons and ratings")
    if reader.stats.refused:
        run.log.warning("%d votes refused: %s", reader.stats.refused, dict(reader.stats.reasons))
    return Votes(rows, modes.pop(), [describe_input("votes", given)])


def check_vote(row: Record) -> None:
    """Raises ValueError for a record that is no vote."""
    if lacking := [name for name in ("item", "rater", "value") if name not in row]:
        raise ValueError(
            f"is no vote, lacks {', '.join(lacking)}: give the database of pref-collect serve, or the output "
            "of simulate"
        )
    candidate = candidate_of(
        {k: v for k, v in row.items() if k in ("prompt", "completion", "completion_a", "completion_b")}
    )
    compares = candidate.mode == "compare"
    kinds = {
        "item": str,
        "rater": str,
        "value": int,
        "aspects": dict,
        "reason": str,
        "edited": str,
        "repeat": bool,
        "seconds": (int, float),
        "simulated": bool,
        "extra": dict,
        **({"both_bad": bool, "left": str} if compares else {}),
    }
    for name, kind in kinds.items():
        if name not in row or not isinstance(row[name], kind):  # type: ignore[arg-type]
            raise ValueError(f"field {name!r}: missing or of the wrong type; is this a stream of votes?")
    low, high = (-3, 3) if compares else (1, 7)
    for name, value in [("value", row["value"]), *row["aspects"].items()]:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"field {name!r}: must be an integer from {low} to {high}")
    if compares and row["left"] not in ("a", "b"):
        raise ValueError("field 'left': must be 'a' or 'b'")


def prompt_key(row: Record) -> str:
    """What may not stand on two sides of a split: the prompt, case and white space aside."""
    return " ".join(as_text(row["prompt"]).split()).casefold()


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True)
