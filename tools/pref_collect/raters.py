"""Raters, their tokens and their logins. Tokens and cookies are kept as hashes only.

A token is ``<rater's number>.<256 random bits>``: the number finds the row, the secret is compared in
constant time. A fast hash is enough for a secret that cannot be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sys
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.pref_collect.db import Login, Rater, database_errors, database_url, open_engine
from tuneutils.tools.pref_collect.params import TokensParams

LOGIN_S = 14 * 24 * 3600
_NOBODY = hashlib.sha256(b"").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def print_tokens(run: Run[TokensParams]) -> Summary:
    """A JSON line with token and link for each rater that is new, or renewed."""
    if urlsplit(run.params.link).scheme not in ("http", "https"):
        raise ToolError(
            f"--link {run.params.link!r}: must begin with http:// or https://", code=ExitCode.USAGE
        )
    engine = open_engine(run.params.db, create=True)
    with database_errors(database_url(run.params.db)):
        made = make_tokens(engine, run.inputs, renew=run.params.renew)
    if not run.json:
        write_tokens(made, run.params.link)
    for name in run.inputs:
        if name not in made:
            run.log.info("%s has a token already; --renew makes a new one", name)
    return {"raters": [{"rater": n, **_shown(t, run.params.link)} for n, t in made.items()]}


def _shown(token: str, link: str) -> dict[str, Any]:
    return {"token": token, "link": f"{link.rstrip('/')}/login#{token}"}


def write_tokens(made: dict[str, str], link: str) -> None:
    """Tokens go to stdout, never through the log."""
    for name, token in made.items():
        sys.stdout.write(json.dumps({"rater": name, **_shown(token, link)}, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def make_tokens(engine: Engine, names: tuple[str, ...], *, renew: bool = False) -> dict[str, str]:
    """Name → token of those that are new; with ``renew`` of all, whose old tokens and logins end."""
    made: dict[str, str] = {}
    for name in names:
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise ToolError(f"rater {name!r}: a name is 1 to 100 printable characters", code=ExitCode.USAGE)
    with Session(engine) as session, session.begin():
        for name in dict.fromkeys(names):
            rater = session.scalar(select(Rater).where(Rater.name == name))
            if rater is not None and not renew:
                continue
            if rater is None:
                rater = Rater(name=name, token_sha256="")
                session.add(rater)
                session.flush()
            secret = secrets.token_urlsafe(32)
            rater.token_sha256 = _sha256(secret)
            session.execute(delete(Login).where(Login.rater_id == rater.id))
            made[name] = f"{rater.id}.{secret}"
    return made


def log_in(session: Session, token: str, now: float) -> str | None:
    """A new login's cookie for a valid token, else None; the comparison takes the same time either way."""
    number, _, secret = token.strip().partition(".")
    rater = (
        session.get(Rater, int(number))
        if number.isascii() and number.isdigit() and len(number) < 10
        else None
    )
    stored = rater.token_sha256 if rater is not None else _NOBODY
    valid = hmac.compare_digest(_sha256(secret), stored)
    if rater is None or not secret or not valid:
        return None
    cookie = secrets.token_urlsafe(32)
    session.execute(delete(Login).where(Login.expires_at < now))
    session.add(Login(cookie_sha256=_sha256(cookie), rater_id=rater.id, expires_at=now + LOGIN_S))
    return cookie


def log_out(session: Session, cookie: str) -> None:
    session.execute(delete(Login).where(Login.cookie_sha256 == _sha256(cookie)))


def rater_of(session: Session, cookie: str, now: float) -> Rater | None:
    """The rater whose browser sent this cookie, found by its hash: timing tells nothing of the cookie."""
    return session.scalar(
        select(Rater)
        .join(Login, Login.rater_id == Rater.id)
        .where(Login.cookie_sha256 == _sha256(cookie), Login.expires_at > now)
    )


def csrf_token(cookie: str) -> str:
    """What forms must send back: derived from the cookie, which other sites cannot read."""
    return hmac.new(cookie.encode(), b"csrf", "sha256").hexdigest()


def csrf_matches(cookie: str, given: str) -> bool:
    return hmac.compare_digest(csrf_token(cookie).encode(), given.encode())
