"""Between a form's fields and what is stored: on the page the left answer is A, whichever it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuneutils.tools.pref_collect.assign import Refused
from tuneutils.tools.pref_collect.candidates import as_text
from tuneutils.tools.pref_collect.db import Assignment
from tuneutils.tools.pref_collect.study import Settings

LONGEST_TEXT = 20_000
BOTH_BAD = "both-bad"


@dataclass(frozen=True)
class Point:
    """A point of a scale: its value, its name, and how it looks."""

    value: int
    name: str
    size: int
    side: str


#: How much better the left answer is, from the left end of the scale to the right.
COMPARE = (
    Point(3, "A much better", 3, "one"),
    Point(2, "A better", 2, "one"),
    Point(1, "A slightly better", 1, "one"),
    Point(0, "Equal", 0, "even"),
    Point(-1, "B slightly better", 1, "two"),
    Point(-2, "B better", 2, "two"),
    Point(-3, "B much better", 3, "two"),
)
RATE = tuple(
    Point(value, name, 2, "two" if value < 4 else "one" if value > 4 else "even")
    for value, name in enumerate(
        ("Very bad", "Bad", "Rather bad", "Fair", "Rather good", "Good", "Very good"), start=1
    )
)
SCALES = {"compare": COMPARE, "rate": RATE}


def shown_item(
    assignment: Assignment, settings: Settings, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the page shows of an assignment: nothing that tells where a completion came from."""
    content = assignment.item.content
    completions = [content["a"]] if settings.mode == "rate" else [content["a"], content["b"]]
    if assignment.swapped:
        completions.reverse()
    names = ("Answer",) if settings.mode == "rate" else ("Answer A", "Answer B")
    return {
        "assignment_id": assignment.id,
        "mode": settings.mode,
        "question": "How good is the answer?" if settings.mode == "rate" else "Which answer is better?",
        "prompt": turns(content["prompt"]),
        "answers": [
            {"name": name, "content": turns(c), "plain": as_text(c)}
            for name, c in zip(names, completions, strict=True)
        ],
        "points": SCALES[settings.mode],
        "aspects": settings.aspects,
        "before": before or {"choice": None, "aspects": {}, "reason": "", "edited": ""},
        "longest_text": LONGEST_TEXT,
    }


def turns(value: str | list[dict[str, Any]]) -> list[dict[str, str]]:
    """Text, or a conversation's messages, as turns with a role where there is one."""
    if isinstance(value, str):
        return [{"role": "", "text": value}]
    named = len(value) > 1
    return [{"role": str(m["role"]) if named else "", "text": str(m["content"])} for m in value]


def number(form: Mapping[str, str], name: str) -> int:
    text = form.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise Refused(f"The request has no valid {name}.", 400)
    return int(text)


def parse_response(form: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """The answer in a form, checked.

    Raises:
        Refused: a choice is missing or not on the scale, or a text is too long (422).
    """
    values = {str(point.value): point.value for point in SCALES[settings.mode]}
    choice: int | str | None = values.get(form.get("choice", ""))
    if choice is None and settings.mode == "compare" and form.get("choice") == BOTH_BAD:
        choice = BOTH_BAD
    if choice is None:
        raise Refused("Choose one of the answers first.", 422)
    aspects = {}
    for i, aspect in enumerate(settings.aspects):
        given = form.get(f"aspect-{i}", "")
        if given and given not in values:
            raise Refused(f"The answer to {aspect!r} is not on the scale.", 422)
        if given:
            aspects[aspect] = values[given]
    return {
        "choice": choice,
        "aspects": aspects,
        "reason": _text(form, "reason"),
        "edited": _text(form, "edited"),
    }


def _text(form: Mapping[str, str], name: str) -> str:
    # PostgreSQL cannot hold NUL; browsers send line ends as CR LF.
    text = form.get(name, "").replace("\x00", "").replace("\r\n", "\n").strip()
    if len(text) > LONGEST_TEXT:
        raise Refused(f"The {name} has more than {LONGEST_TEXT} characters.", 422)
    return text
