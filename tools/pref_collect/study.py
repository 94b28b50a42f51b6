"""A study: its settings and items, set up once in a database and found again at the next start."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select, update
from sqlalchemy.orm import Session

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import Reader
from tuneutils.tools.pref_collect.candidates import Candidate, items_digest, read_candidates
from tuneutils.tools.pref_collect.db import Item, Study, lock_assignments
from tuneutils.tools.pref_collect.params import StudyParams

GROWS = ("overlap", "per_rater")  # may change while a study runs


@dataclass(frozen=True)
class Settings:
    """How items are handed out; stored with the study."""

    mode: str = "compare"
    overlap: int = 1
    per_rater: int | None = None
    repeat_share: float = 0.0
    repeat_gap: int = 10
    gold_every: int = 10
    order: str = "random"
    aspects: tuple[str, ...] = ()
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "aspects": list(self.aspects)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Settings:
        return cls(**{**stored, "aspects": tuple(stored["aspects"])})

    def chance(self, *what: object) -> float:
        """A number in [0, 1) that depends on the seed and on ``what`` alone."""
        text = "\x1f".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def settings_of(run: Run[Any], mode: str) -> Settings:
    params: StudyParams = run.params
    names = {f.name for f in dataclasses.fields(Settings)} - {"mode", "aspects", "seed"}
    given = {name: getattr(params, name) for name in names}
    return Settings(mode=mode, aspects=params.aspect, seed=run.seed, **given)


def load_candidates(run: Run[Any]) -> list[Candidate]:
    """The run's inputs; with ``--on-error quarantine`` refused lines go beside the output or database."""
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    found = read_candidates(reader, run.params.mode)
    if reader.stats.refused:
        run.log.warning("%d records refused: %s", reader.stats.refused, dict(reader.stats.reasons))
    return found


def set_up(engine: Engine, run: Run[Any], candidates: Sequence[Candidate]) -> Settings:
    """Put the study into the database, or check that the one there is the same.

    Raises:
        ToolError: the database holds another study (65).
    """
    wanted = settings_of(run, candidates[0].mode)
    digest = items_digest(candidates)
    with Session(engine) as session, session.begin():
        lock_assignments(session)
        study = session.scalar(select(Study))
        if study is not None:
            _check_same(study, wanted, digest)
            more = wanted.overlap - study.settings["overlap"]
            session.execute(update(Item).values(room=Item.room + more))
            study.settings = wanted.as_json()
            return wanted
        inputs = [describe_input("candidates", path).as_json() for path in run.inputs]
        session.add(Study(settings=wanted.as_json(), inputs=inputs, items_sha256=digest))
        session.add_all(_items(candidates, wanted))
    return wanted


def _check_same(study: Study, wanted: Settings, digest: str) -> None:
    if study.items_sha256 != digest:
        raise ToolError("the database holds a study of other candidates; name another --db")
    stored = Settings.from_json(study.settings)
    for name, value in dataclasses.asdict(stored).items():
        if name not in GROWS and value != getattr(wanted, name):
            flag = "--" + name.replace("_", "-").replace("aspects", "aspect")
            raise ToolError(
                f"the study was begun with {flag} {value!r}, not {getattr(wanted, name)!r}; "
                "give the same, or name another --db"
            )
    if wanted.overlap < stored.overlap:
        raise ToolError(
            f"--overlap {wanted.overlap}: the study was begun with {stored.overlap}; it can only grow"
        )


def _items(candidates: Sequence[Candidate], settings: Settings) -> list[Item]:
    order = list(range(len(candidates)))
    if settings.order == "random":
        random.Random(settings.seed).shuffle(order)
    return [
        Item(
            key=candidates[i].key,
            position=position,
            content=candidates[i].content,
            is_gold=candidates[i].gold is not None,
            gold=candidates[i].gold,
            extra=candidates[i].extra,
            room=settings.overlap,
        )
        for position, i in enumerate(order)
    ]
