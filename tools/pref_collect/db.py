"""The study's database: SQLite in WAL mode by default, PostgreSQL for a team.

A transaction that has returned is on the disk: SQLite runs with ``synchronous=FULL``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Engine,
    ForeignKey,
    Index,
    String,
    Text,
    UniqueConstraint,
    and_,
    create_engine,
    event,
    literal_column,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import StaticPool

from tuneutils.shared.errors import ExitCode, ToolError

BUSY_TIMEOUT_S = 10
MEMORY = "sqlite://"
_LOCK_ID = 0x70726566  # "pref": PostgreSQL's advisory lock for handing out items


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012 - SQLAlchemy's own form


class Study(Base):
    """What is being rated and how; one row."""

    __tablename__ = "study"
    id: Mapped[int] = mapped_column(primary_key=True)
    settings: Mapped[dict[str, Any]]
    inputs: Mapped[list[Any]]
    items_sha256: Mapped[str] = mapped_column(String(64))


class Item(Base):
    """A prompt with one or two completions.

    Attributes:
        position: the order in which items are handed out.
        gold: the known answer of a control item, in a JSON object under ``value``.
        extra: the record's other fields; never shown to raters.
        room: how many more raters it may go to; gold items have no limit.
    """

    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    position: Mapped[int]
    content: Mapped[dict[str, Any]]
    is_gold: Mapped[bool]
    gold: Mapped[str | None] = mapped_column(String(16))
    extra: Mapped[dict[str, Any]]
    room: Mapped[int]


class Rater(Base):
    """A person, or a simulated one. The token's secret is stored as its SHA-256."""

    __tablename__ = "rater"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    token_sha256: Mapped[str] = mapped_column(String(64))
    simulated: Mapped[bool] = mapped_column(default=False)


class Login(Base):
    """A browser that has shown a token; its cookie is stored as its SHA-256."""

    __tablename__ = "login"
    cookie_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    expires_at: Mapped[float]


class Assignment(Base):
    """An item in the hands of a rater.

    Attributes:
        serial: the how-manieth of this rater.
        repeat: the second time that this rater gets the item.
        comes_again: chosen to be repeated later.
        swapped: completion B is on the left.
        answered: has an answer that was not withdrawn.
        released: not answered in time, and free for others since.
    """

    __tablename__ = "assignment"
    __table_args__ = (
        UniqueConstraint("item_id", "rater_id", "repeat"),
        Index("assignment_by_rater", "rater_id", "answered", "released"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("item.id"))
    rater_id: Mapped[int] = mapped_column(ForeignKey("rater.id"))
    serial: Mapped[int]
    repeat: Mapped[bool] = mapped_column(default=False)
    comes_again: Mapped[bool] = mapped_column(default=False)
    swapped: Mapped[bool]
    assigned_at: Mapped[float]
    answered: Mapped[bool] = mapped_column(default=False)
    released: Mapped[bool] = mapped_column(default=False)
    item: Mapped[Item] = relationship(lazy="joined")
    rater: Mapped[Rater] = relationship()


class Answer(Base):
    """A click. Nothing is deleted: an undone answer is marked as withdrawn.

    Attributes:
        submission_id: made by the client, so that a repeated request stores nothing twice.
        response: the answer as given, left and right not yet translated to A and B.
        seconds: from handing out to answering, on the server's clock.
    """

    __tablename__ = "answer"
    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignment.id"))
    submission_id: Mapped[str] = mapped_column(String(64), unique=True)
    response: Mapped[dict[str, Any]]
    seconds: Mapped[float]
    created_at: Mapped[float]
    withdrawn: Mapped[bool] = mapped_column(default=False)
    note: Mapped[str | None] = mapped_column(Text)
    assignment: Mapped[Assignment] = relationship()


# Conditions are written once, as literals: an index on a part of a table serves only the same condition.
OPEN_ITEM = and_(~Item.is_gold, Item.room > literal_column("0"))
WAITING = and_(~Assignment.answered, ~Assignment.released)


def _partial(name: str, column: Any, condition: Any, *, unique: bool = False) -> Index:
    return Index(name, column, unique=unique, sqlite_where=condition, postgresql_where=condition)


_partial("one_answer_an_assignment", Answer.assignment_id, ~Answer.withdrawn, unique=True)
_partial("item_open", Item.position, OPEN_ITEM)
_partial("item_gold", Item.position, Item.is_gold)
_partial("assignment_waiting", Assignment.assigned_at, WAITING)


def database_url(given: str) -> URL:
    """``sqlite:///FILE``, ``postgresql://…``, or the path of an SQLite file.

    Raises:
        ToolError: another scheme, or no URL (2). The message holds no password.
    """
    try:
        url = make_url(given if "://" in given else f"sqlite:///{given}")
    except (ArgumentError, ValueError) as exc:
        raise ToolError(
            "--db: is no database URL; write sqlite:///FILE or postgresql://…", code=ExitCode.USAGE
        ) from exc
    if url.drivername in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ToolError(
            f"--db {url.drivername}://…: only sqlite:///FILE and postgresql://… are known",
            code=ExitCode.USAGE,
        )
    return url


def shown(url: URL) -> str:
    """The database's name without user, password or driver."""
    if url.drivername == "sqlite":
        return url.database or ":memory:"
    return f"postgresql://{url.host or 'localhost'}/{url.database or ''}"


def open_engine(given: str, *, create: bool = False) -> Engine:
    """Connect, and with ``create`` make the tables that are absent.

    Raises:
        ToolError: no database there (66), not one of ours (65), unreachable (75), not writable (73).
    """
    url = database_url(given)
    sqlite = url.drivername == "sqlite"
    if sqlite and url.database and not create and not Path(url.database).is_file():
        raise ToolError(f"{url.database}: no such database", code=ExitCode.MISSING_INPUT)
    if sqlite and not url.database:
        engine = create_engine(
            url, hide_parameters=True, poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
    elif sqlite:
        engine = create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    else:
        engine = create_engine(url, hide_parameters=True, pool_size=16, max_overflow=0, pool_pre_ping=True)
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    with database_errors(url):
        if create:
            Base.metadata.create_all(engine)
        with engine.connect() as connection:
            connection.execute(text("SELECT count(*) FROM rater"))
    return engine


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late to take the write lock
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Any) -> None:
    """A transaction takes the write lock at once: upgrading from a read lock later could fail."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def lock_assignments(session: Session) -> None:
    """Let one transaction at a time hand out items; SQLite's transactions already do."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})


def is_full(exc: DatabaseError) -> bool:
    """Whether the database could not write for want of space (or of permission to grow)."""
    said = str(exc.orig).lower()
    code = getattr(exc.orig, "sqlstate", None)
    return code == "53100" or any(
        part in said for part in ("disk is full", "disk i/o error", "no space left", "readonly database")
    )


@contextmanager
def database_errors(url: URL) -> Iterator[None]:
    """Say in one line, without credentials, what is wrong with a database."""
    try:
        yield
    except DatabaseError as exc:
        name, reason = shown(url), str(exc.orig).strip().partition("\n")[0]
        if is_full(exc) or "unable to open" in reason:
            raise ToolError(f"{name}: cannot write: {reason}", code=ExitCode.CANNOT_WRITE) from exc
        if isinstance(exc, OperationalError) and url.drivername != "sqlite":
            message = f"{name}: cannot connect; is the server up, and the password right (~/.pgpass)?"
            raise ToolError(message, code=ExitCode.RETRYABLE) from exc
        if "locked" in reason:
            raise ToolError(f"{name}: busy in another process; try again", code=ExitCode.RETRYABLE) from exc
        raise ToolError(f"{name}: no database of pref-collect: {reason}") from exc
