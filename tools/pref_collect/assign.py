"""Handing out items and taking answers: each function runs inside one transaction."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, func, select, update
from sqlalchemy.orm import Session, aliased

from tuneutils.tools.pref_collect.db import (
    OPEN_ITEM,
    WAITING,
    Answer,
    Assignment,
    Item,
    Rater,
    lock_assignments,
)
from tuneutils.tools.pref_collect.study import Settings

SUBMISSION_ID = re.compile(r"[A-Za-z0-9-]{16,64}")


class Refused(Exception):
    """An answer that is not stored.

    Attributes:
        status: the HTTP status that says so.
    """

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Progress:
    """How far a rater is: answered, and still to come as things stand."""

    done: int
    left: int


def next_assignment(
    session: Session, settings: Settings, rater: Rater, now: float, lease_s: float
) -> Assignment | None:
    """What the rater is to do now: the open assignment if there is one, else a new one; None at the end."""
    lock_assignments(session)
    current = _open_assignment(session, rater)
    if current is not None:
        return current
    _release_overdue(session, now - lease_s)
    done = answered_by(session, rater)
    if settings.per_rater is not None and done >= settings.per_rater:
        return None
    again = _due_repeat(session, settings, rater, done)
    if again is not None:
        return _assign(session, settings, again.item, rater, done, now, repeat=True)
    item = _due_gold(session, settings, rater, done) or _fresh_item(session, rater)
    return None if item is None else _assign(session, settings, item, rater, done, now, repeat=False)


def _open_assignment(session: Session, rater: Rater) -> Assignment | None:
    """An undone one comes before the one handed out after it."""
    return session.scalar(
        select(Assignment).where(Assignment.rater_id == rater.id, WAITING).order_by(Assignment.id).limit(1)
    )


def answered_by(session: Session, rater: Rater) -> int:
    found = select(func.count()).where(Assignment.rater_id == rater.id, Assignment.answered)
    return session.scalar(found) or 0


def _release_overdue(session: Session, before: float) -> None:
    """One statement: an answer that arrives meanwhile is kept."""
    overdue = session.execute(
        update(Assignment)
        .where(WAITING, Assignment.assigned_at < before)
        .values(released=True)
        .returning(Assignment.item_id, Assignment.repeat)
    )
    for item_id, repeat in overdue.all():
        if not repeat:
            session.execute(update(Item).where(Item.id == item_id).values(room=Item.room + 1))


def _due_repeat(session: Session, settings: Settings, rater: Rater, done: int) -> Assignment | None:
    if not settings.repeat_share:
        return None
    second = aliased(Assignment)
    return session.scalar(
        select(Assignment)
        .where(
            Assignment.rater_id == rater.id,
            Assignment.answered,
            Assignment.comes_again,
            ~Assignment.repeat,
            Assignment.serial <= done - settings.repeat_gap,
            ~exists().where(second.item_id == Assignment.item_id, second.rater_id == rater.id, second.repeat),
        )
        .order_by(Assignment.serial)
        .limit(1)
    )


def _unseen(rater: Rater) -> Any:
    """Never handed to this rater, not even in vain."""
    return ~exists().where(Assignment.item_id == Item.id, Assignment.rater_id == rater.id)


def _due_gold(session: Session, settings: Settings, rater: Rater, done: int) -> Item | None:
    """One in each block of ``gold_every``, at a place that differs between blocks and raters."""
    block, place = divmod(done, settings.gold_every)
    if place < int(settings.chance("gold", rater.name, block) * settings.gold_every):
        return None
    item = session.scalar(select(Item).where(Item.is_gold, _unseen(rater)).order_by(Item.position).limit(1))
    if item is None:
        return None
    mine = (Assignment.rater_id == rater.id, Item.is_gold)
    given = session.scalar(select(func.count()).select_from(Assignment).join(Item).where(*mine)) or 0
    return item if given <= block else None


def _fresh_item(session: Session, rater: Rater) -> Item | None:
    return session.scalar(select(Item).where(OPEN_ITEM, _unseen(rater)).order_by(Item.position).limit(1))


def _assign(
    session: Session, settings: Settings, item: Item, rater: Rater, done: int, now: float, *, repeat: bool
) -> Assignment:
    who = (rater.name, item.key)
    if not repeat:
        session.execute(update(Item).where(Item.id == item.id).values(room=Item.room - 1))
    made = Assignment(
        item=item,
        rater_id=rater.id,
        serial=done,
        repeat=repeat,
        comes_again=not repeat
        and not item.is_gold
        and settings.chance("again", *who) < settings.repeat_share,
        swapped=settings.mode == "compare" and settings.chance("swap", *who, repeat) < 0.5,
        assigned_at=now,
    )
    session.add(made)
    session.flush()
    return made


def progress(session: Session, settings: Settings, rater: Rater) -> Progress:
    """Repeats and gold that are not yet handed out do not count: the rater shall not know of them."""
    done = answered_by(session, rater)
    mine = Assignment.rater_id == rater.id
    waiting = session.scalar(select(func.count()).where(mine, WAITING)) or 0
    room = session.scalar(select(func.count()).select_from(Item).where(OPEN_ITEM)) or 0
    seen = select(func.count()).select_from(Assignment).join(Item).where(mine, ~Assignment.repeat, OPEN_ITEM)
    left = waiting + room - (session.scalar(seen) or 0)
    if settings.per_rater is not None:
        left = min(left, max(0, settings.per_rater - done))
    return Progress(done, left)


def record_answer(
    session: Session,
    rater: Rater,
    assignment_id: int,
    submission_id: str,
    response: dict[str, Any],
    now: float,
) -> Answer:
    """Store an answer; the same submission again changes nothing and gives the stored one.

    Raises:
        Refused: the assignment is another rater's, was answered otherwise, or was given to someone else.
    """
    if not SUBMISSION_ID.fullmatch(submission_id):
        raise Refused("The request has no valid submission id.", 400)
    assignment = session.get(Assignment, assignment_id, with_for_update={"of": Assignment})
    if assignment is None or assignment.rater_id != rater.id:
        raise Refused("There is no such question for you.", 404)
    stored = session.scalar(select(Answer).where(Answer.submission_id == submission_id))
    if stored is not None:
        if stored.assignment_id == assignment.id and stored.response == response:
            return stored
        raise Refused("This was answered differently before. Undo that answer to change it.")
    if assignment.answered:
        raise Refused("This is answered already. Undo that answer to change it.")
    if assignment.released:
        raise Refused("This waited too long and was given to someone else.", 410)
    assignment.answered = True
    answer = Answer(
        assignment_id=assignment.id,
        submission_id=submission_id,
        response=response,
        seconds=max(0.0, round(now - assignment.assigned_at, 3)),
        created_at=now,
    )
    session.add(answer)
    session.flush()
    return answer


def last_answer(session: Session, rater: Rater) -> Answer | None:
    return session.scalar(
        select(Answer)
        .join(Assignment)
        .where(Assignment.rater_id == rater.id, ~Answer.withdrawn)
        .order_by(Answer.id.desc())
        .limit(1)
    )


def undo(session: Session, rater: Rater, answer_id: int, now: float) -> Answer:
    """Withdraw an answer and open its assignment again; a second time changes nothing.

    Raises:
        Refused: it is not the rater's last answer.
    """
    answer = session.get(Answer, answer_id)
    if answer is None or answer.assignment.rater_id != rater.id:
        raise Refused("There is no such answer of yours.", 404)
    if answer.withdrawn:
        return answer
    last = last_answer(session, rater)
    if last is None or last.id != answer.id:
        raise Refused("Only the last answer can be undone.")
    answer.withdrawn = True
    answer.assignment.answered = False
    answer.assignment.assigned_at = now
    session.flush()
    return answer


def withdrawn_answer(session: Session, assignment: Assignment) -> Answer | None:
    """The answer that was undone last, to fill the form with."""
    return session.scalar(
        select(Answer)
        .where(Answer.assignment_id == assignment.id, Answer.withdrawn)
        .order_by(Answer.id.desc())
        .limit(1)
    )
