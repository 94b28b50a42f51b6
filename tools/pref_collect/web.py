"""The page: a Starlette application. A click is acknowledged after its transaction has been committed."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any, TypeVar

import anyio
import jinja2
from sqlalchemy import Engine
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from tuneutils.tools.pref_collect import assign, forms, raters
from tuneutils.tools.pref_collect.db import Rater, is_full
from tuneutils.tools.pref_collect.security import Guard, Limiter, same_origin
from tuneutils.tools.pref_collect.study import Settings

HERE = Path(__file__).parent
FAILED_LOGINS_PER_MINUTE = 10
HEADINGS = {
    400: "That did not work",
    401: "Please log in",
    403: "Not allowed",
    404: "Nothing here",
    409: "Already answered",
    410: "Too late",
    413: "Too long",
    421: "Wrong address",
    422: "Something is missing",
    429: "Slow down",
    503: "Not saved",
    507: "Not saved",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the page is served with."""

    title: str
    guidelines: str = ""
    lease_s: float = 1800.0
    https: bool = False
    hosts: frozenset[str] = frozenset()
    max_body_bytes: int = 256 * 1024
    requests_per_s: float = 20.0


class LoginNeeded(Exception):
    """The request has no valid cookie."""


class Page:
    """The handlers, with the engine and settings that they share."""

    def __init__(self, engine: Engine, settings: Settings, options: Options, log: Logger) -> None:
        self.engine, self.settings, self.options, self.log = engine, settings, options, log
        self.cookie = "__Host-pref-collect" if options.https else "pref-collect"
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.templates.globals.update(title=options.title, static=static_url)
        self.failed_logins = Limiter(FAILED_LOGINS_PER_MINUTE / 60, FAILED_LOGINS_PER_MINUTE)
        # SQLite has one writer: a queue here is fairer and faster than its busy waiting.
        self.threads = anyio.CapacityLimiter(1 if engine.dialect.name == "sqlite" else 16)

    async def transact(self, function: Callable[[Session], T]) -> T:
        """Run ``function`` in one transaction, committed when this returns."""

        def call() -> T:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                return function(session)

        return await anyio.to_thread.run_sync(call, limiter=self.threads)

    def rater(self, session: Session, cookie: str) -> Rater:
        rater = raters.rater_of(session, cookie, time.time()) if cookie else None
        if rater is None:
            raise LoginNeeded
        return rater

    def html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(template).render(values), status)

    async def item(self, request: Request) -> Response:
        cookie = request.cookies.get(self.cookie, "")
        values = await self.transact(partial(self._item, cookie))
        return self.html("item.html" if "points" in values else "done.html", **values)

    def _item(self, cookie: str, session: Session) -> dict[str, Any]:
        rater = self.rater(session, cookie)
        now = time.time()
        assignment = assign.next_assignment(session, self.settings, rater, now, self.options.lease_s)
        last = assign.last_answer(session, rater)
        values = {
            "csrf": raters.csrf_token(cookie),
            "rater": rater.name,
            "progress": assign.progress(session, self.settings, rater),
            "last_answer_id": last.id if last else None,
        }
        if assignment is None:
            return values
        before = assign.withdrawn_answer(session, assignment)
        return {
            **values,
            **forms.shown_item(assignment, self.settings, before.response if before else None),
            "guidelines": self.options.guidelines,
            "submission_id": str(uuid.uuid4()),
        }

    async def answer(self, request: Request) -> Response:
        form, cookie = await self.checked_form(request)
        assignment_id, submission_id = forms.number(form, "assignment_id"), form.get("submission_id", "")
        response = forms.parse_response(form, self.settings)

        def store(session: Session) -> int:
            rater = self.rater(session, cookie)
            return assign.record_answer(
                session, rater, assignment_id, submission_id, response, time.time()
            ).id

        answer_id = await self.transact(store)
        if wants_json(request):
            return JSONResponse({"saved": answer_id})
        return RedirectResponse("/", 303)

    async def undo(self, request: Request) -> Response:
        form, cookie = await self.checked_form(request)
        answer_id = forms.number(form, "answer_id")
        await self.transact(
            lambda session: assign.undo(session, self.rater(session, cookie), answer_id, time.time()).id
        )
        return JSONResponse({"undone": answer_id}) if wants_json(request) else RedirectResponse("/", 303)

    async def login_page(self, _request: Request) -> Response:
        return self.html("login.html", problem="")

    async def login(self, request: Request) -> Response:
        if not same_origin(request.headers):
            raise HTTPException(403, "The form was sent from another site.")
        address = request.client.host if request.client else ""
        if not self.failed_logins.allows(address):
            raise HTTPException(429, "Too many wrong tokens. Wait a minute.")
        form = await read_form(request)
        token = form.get("token", "")
        cookie = await self.transact(lambda session: raters.log_in(session, token, time.time()))
        if cookie is None:
            self.failed_logins.take(address)
            return self.html("login.html", 401, problem="That token is not known. Is it complete?")
        response = RedirectResponse("/", 303)
        response.set_cookie(
            self.cookie,
            cookie,
            max_age=raters.LOGIN_S,
            httponly=True,
            samesite="strict",
            secure=self.options.https,
        )
        return response

    async def logout(self, request: Request) -> Response:
        _, cookie = await self.checked_form(request)
        await self.transact(lambda session: raters.log_out(session, cookie))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(self.cookie, httponly=True, samesite="strict", secure=self.options.https)
        return response

    async def health(self, _request: Request) -> Response:
        await self.transact(lambda session: session.connection().exec_driver_sql("SELECT 1").scalar())
        return JSONResponse({"ok": True})

    async def checked_form(self, request: Request) -> tuple[dict[str, str], str]:
        """The form's fields and the cookie, after the checks against forged requests."""
        cookie = request.cookies.get(self.cookie, "")
        if not cookie:
            raise LoginNeeded
        form = await read_form(request)
        if not same_origin(request.headers) or not raters.csrf_matches(cookie, form.get("csrf", "")):
            raise HTTPException(403, "The form is not from this page, or too old. Reload it and try again.")
        return form, cookie

    def error(self, status: int, message: str) -> Callable[..., Any]:
        """An error as a plain page, or as JSON for scripts."""

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.error_response(Request(scope), status, message)(scope, receive, send)

        return app

    def error_response(self, request: Request, status: int, message: str) -> Response:
        if wants_json(request):
            return JSONResponse({"error": message}, status)
        return self.html("error.html", status, heading=HEADINGS.get(status, "Not saved"), message=message)

    async def on_http_error(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, HTTPException)
        known = {404: "There is no such page.", 405: "That cannot be done here."}
        return self.error_response(request, exc.status_code, known.get(exc.status_code, exc.detail))

    async def on_refused(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, assign.Refused)
        return self.error_response(request, exc.status, str(exc))

    async def on_login_needed(self, request: Request, _exc: Exception) -> Response:
        if wants_json(request):
            return JSONResponse({"error": "Please log in again."}, 401)
        return RedirectResponse("/login", 303)

    async def on_disconnect(self, _request: Request, _exc: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def on_database_error(self, request: Request, exc: Exception) -> Response:
        assert isinstance(exc, DatabaseError)
        if is_full(exc):
            self.log.error("the database cannot be written (disk full?): answers are refused until it can")
            return self.error_response(request, 507, "Not saved: the server's disk is full. Try again later.")
        self.log.error("database: %s", str(exc.orig).strip().partition("\n")[0])
        return self.error_response(request, 503, "Not saved: the database does not answer. Try again.")

    async def on_bug(self, request: Request, exc: Exception) -> Response:
        self.log.error("bug: %s in %s (-v shows the traceback)", type(exc).__name__, request.url.path)
        self.log.debug("traceback", exc_info=exc)
        return self.error_response(request, 500, "Not saved: something went wrong on the server.")


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a URL-encoded form; files and repeated fields are refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(400, "The request is not a form of this page.")
    async with request.form(max_fields=100) as form:
        pairs = [(k, v) for k, v in form.multi_items() if isinstance(v, str)]
    if len(dict(pairs)) != len(pairs):
        raise HTTPException(400, "A field came twice.")
    return dict(pairs)


def wants_json(request: Request) -> bool:
    return "application/json" in request.headers.get("accept", "")


def static_url(name: str) -> str:
    """The address of a static file, which changes with its content: it may be cached for good."""
    return f"/static/{name}?{_digest(name)}"


def _digest(name: str, _known: dict[str, str] = {}) -> str:  # noqa: B006 - a cache
    if name not in _known:
        _known[name] = hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]
    return _known[name]


class Static(StaticFiles):
    """Files with an address that changes with them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "public, max-age=31536000, immutable"
        return response


def build_app(engine: Engine, settings: Settings, options: Options, log: Logger) -> Starlette:
    """The application over a database that ``study.set_up`` has filled."""
    page = Page(engine, settings, options, log)
    return Starlette(
        routes=[
            Route("/", page.item),
            Route("/answer", page.answer, methods=["POST"]),
            Route("/undo", page.undo, methods=["POST"]),
            Route("/login", page.login_page),
            Route("/login", page.login, methods=["POST"]),
            Route("/logout", page.logout, methods=["POST"]),
            Route("/healthz", page.health),
            Mount("/static", Static(directory=HERE / "static")),
        ],
        middleware=[
            Middleware(
                Guard,
                hosts=options.hosts,
                max_body_bytes=options.max_body_bytes,
                requests_per_s=options.requests_per_s,
                https=options.https,
                cookie=page.cookie,
                send_error=page.error,
            )
        ],
        exception_handlers={
            HTTPException: page.on_http_error,
            assign.Refused: page.on_refused,
            LoginNeeded: page.on_login_needed,
            ClientDisconnect: page.on_disconnect,
            DatabaseError: page.on_database_error,
            Exception: page.on_bug,
        },
    )
