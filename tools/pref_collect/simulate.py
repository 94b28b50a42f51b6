"""Simulated raters: a stated rule with noise, through the same assignment as people.

With chance ``position_bias`` a rater prefers the left completion whatever it says; else the rule's answer
is given, reversed with chance ``flip_rate``. Votes, manifest and everything made of them say "simulated".
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import open_writer
from tuneutils.tools.pref_collect import assign
from tuneutils.tools.pref_collect.candidates import as_text
from tuneutils.tools.pref_collect.db import MEMORY, Assignment, Item, Rater, open_engine
from tuneutils.tools.pref_collect.params import SimulateParams
from tuneutils.tools.pref_collect.study import Settings, load_candidates, set_up
from tuneutils.tools.pref_collect.votes import rows_of

SECONDS_AN_ANSWER = 10.0  # by the clock of the simulation
POSITIVE = frozenset(
    (
        "good",
        "great",
        "best",
        "better",
        "nice",
        "kind",
        "helpful",
        "thanks",
        "thank",
        "please",
        "happy",
        "glad",
        "love",
        "excellent",
        "wonderful",
        "useful",
        "clear",
        "safe",
        "sure",
        "enjoy",
        "welcome",
        "fine",
        "well",
        "perfect",
        "beautiful",
        "success",
        "hope",
    )
)
NEGATIVE = frozenset(
    (
        "bad",
        "worse",
        "worst",
        "hate",
        "stupid",
        "idiot",
        "ugly",
        "awful",
        "terrible",
        "horrible",
        "kill",
        "hurt",
        "angry",
        "sad",
        "sorry",
        "fail",
        "failure",
        "wrong",
        "unsafe",
        "useless",
        "damn",
        "hell",
        "shut",
        "dumb",
        "never",
        "cannot",
    )
)
Strength = Callable[[Item], float]


def simulate(run: Run[SimulateParams]) -> Summary:
    """Write the votes of ``raters`` simulated raters on the run's candidates."""
    params = run.params
    inputs = [describe_input("candidates", path) for path in run.inputs]
    check_stream(run, inputs)
    candidates = load_candidates(run)
    engine = open_engine(MEMORY, create=True)
    settings = set_up(engine, run, candidates)
    strength = RULES[params.rule](params, settings)
    with Session(engine) as session, session.begin():
        _vote(session, run, settings, strength)
        rows = rows_of(session)
    engine.dispose()
    with open_writer(str(run.output)) as writer:
        for row in rows:
            writer.write(row)
    metrics = {"votes": len(rows), "items": len(candidates), "raters": params.raters}
    if run.output != "-" and Path(str(run.output)).is_file():
        said = {"licence": inputs[0].licence, "source": inputs[0].source}
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, simulated=True, **said)
    run.log.info("%d simulated votes of %d raters on %d items", len(rows), params.raters, len(candidates))
    return {"output": run.output, "simulated": True, **metrics}


def _vote(session: Session, run: Run[SimulateParams], settings: Settings, strength: Strength) -> None:
    """Raters take turns until nobody is given anything any more."""
    raters = [
        Rater(name=f"simulated-{i + 1}", token_sha256="", simulated=True) for i in range(run.params.raters)
    ]
    session.add_all(raters)
    session.flush()
    clocks = dict.fromkeys(range(len(raters)), 0.0)
    noise = [np.random.default_rng((run.seed, i)) for i in range(len(raters))]
    while clocks:
        for i in list(clocks):
            assignment = assign.next_assignment(session, settings, raters[i], clocks[i], math.inf)
            if assignment is None:
                del clocks[i]
                continue
            choice = _choice(strength(assignment.item), assignment, run.params, settings, noise[i])
            clocks[i] += SECONDS_AN_ANSWER
            response = {"choice": choice, "aspects": {}, "reason": "", "edited": ""}
            name = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run.seed} {assignment.id}"))
            assign.record_answer(session, raters[i], assignment.id, name, response, clocks[i])


def _choice(
    strength: float, assignment: Assignment, params: SimulateParams, settings: Settings, noise: Any
) -> int:
    """A point of the scale, as seen on the page."""
    biased, flipped = noise.random(2) < (params.position_bias, params.flip_rate)
    if settings.mode == "rate":
        value = round(4 + strength)
        return 8 - value if flipped else value
    if biased:
        return 2
    towards_left = -strength if assignment.swapped else strength
    return round(-towards_left if flipped else towards_left)


def _graded(difference: float, unit: float) -> float:
    """A difference on the scale from -3 to 3: one unit is "better"; none is lost to rounding."""
    graded = min(3.0, max(1.0, 2 * abs(difference) / unit)) if difference else 0.0
    return math.copysign(graded, difference)


def _length(_params: SimulateParams, settings: Settings) -> Strength:
    def strength(item: Item) -> float:
        words = {side: len(as_text(item.content[side]).split()) for side in "ab" if side in item.content}
        if settings.mode == "rate":
            return _graded(words["a"] - 50, 50)
        return _graded(words["a"] - words["b"], max(words.values()) / 2)

    return strength


def _sentiment(_params: SimulateParams, settings: Settings) -> Strength:
    def score(item: Item, side: str) -> int:
        words = re.findall(r"[a-z']+", as_text(item.content[side]).lower())
        return sum((w in POSITIVE) - (w in NEGATIVE) for w in words)

    def strength(item: Item) -> float:
        other = 0 if settings.mode == "rate" else score(item, "b")
        return _graded(score(item, "a") - other, 2)

    return strength


def _score(params: SimulateParams, settings: Settings) -> Strength:
    name = params.score_field
    fields = (name,) if settings.mode == "rate" else (f"{name}_a", f"{name}_b")

    def score(item: Item, field: str) -> float:
        value = item.extra.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ToolError(f"item {item.key}: --rule score needs a number in the field {field!r}")
        return float(value)

    def strength(item: Item) -> float:
        first, *others = (score(item, field) for field in fields)
        return _graded(first - sum(others), 1)

    return strength


RULES: dict[str, Callable[[SimulateParams, Settings], Strength]] = {
    "length": _length,
    "sentiment": _sentiment,
    "score": _score,
}
