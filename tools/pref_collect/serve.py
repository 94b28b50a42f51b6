"""Set the study up, then serve its page until interrupted."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.serving import LOOPBACK, check_host, listen, url_of
from tuneutils.tools.pref_collect.db import (
    Answer,
    Assignment,
    Item,
    Rater,
    database_errors,
    database_url,
    open_engine,
    shown,
)
from tuneutils.tools.pref_collect.params import ServeParams
from tuneutils.tools.pref_collect.raters import make_tokens, write_tokens
from tuneutils.tools.pref_collect.study import load_candidates, set_up
from tuneutils.tools.pref_collect.web import Options, build_app


def serve(run: Run[ServeParams]) -> Summary:
    """Serve until Ctrl-C or SIGTERM; gives the counts of what the database then holds."""
    params = run.params
    options = page_options(params)
    candidates = load_candidates(run)
    url = database_url(params.db)
    engine = open_engine(params.db, create=True)
    with database_errors(url):
        settings = set_up(engine, run, candidates)
        listening = listen(params.host, params.port)
        made = make_tokens(engine, params.rater)
    scheme = "https" if params.tls_cert else "http"
    address = url_of(scheme, listening, params.host)
    if not run.json:
        write_tokens(made, address)
    state = _state(engine)
    run.log.info("%s: %d items, %d answers so far", shown(url), state["items"], state["answers"])
    if state["raters"] < settings.overlap:
        run.log.warning(
            "%d raters for an overlap of %d: add more with pref-collect tokens",
            state["raters"],
            settings.overlap,
        )
    try:
        _serve(run, build_app(engine, settings, options, run.log), listening, address)
    except (KeyboardInterrupt, SystemExit):
        # uvicorn raises the signal again once it has shut down; ending the server is what it meant.
        pass
    finally:
        listening.close()
    state = _state(engine)
    run.log.info("stopped; %d answers are stored in %s", state["answers"], shown(url))
    engine.dispose()
    return {"db": shown(url), **state}


def page_options(params: ServeParams) -> Options:
    """Raises ToolError (2) for an address that others reach without --allow-remote, or half a TLS pair."""
    remote = check_host(params.host, params.allow_remote)
    if bool(params.tls_cert) != bool(params.tls_key):
        raise ToolError("--tls-cert and --tls-key go together", code=ExitCode.USAGE)
    hosts = frozenset(params.trusted_host)
    if not remote:
        hosts |= LOOPBACK | {params.host}
    guidelines = Path(params.guidelines).read_text(encoding="utf-8") if params.guidelines else ""
    for path in (params.tls_cert, params.tls_key):
        if path and not Path(path).is_file():
            raise ToolError(f"{path}: no such file", code=ExitCode.MISSING_INPUT)
    return Options(
        title=params.title,
        guidelines=guidelines.strip(),
        lease_s=params.lease_minutes * 60,
        https=params.behind_https or bool(params.tls_cert),
        hosts=hosts,
        max_body_bytes=params.max_body_kib * 1024,
        requests_per_s=params.requests_per_s,
    )


def _serve(run: Run[ServeParams], app: Any, listening: socket.socket, address: str) -> None:
    import uvicorn

    params = run.params
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=params.behind_https,
        forwarded_allow_ips="127.0.0.1",
        ssl_certfile=params.tls_cert,
        ssl_keyfile=params.tls_key,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        limit_concurrency=1000,
    )
    run.log.info("listening on %s (Ctrl-C ends it)", address)
    uvicorn.Server(config).run(sockets=[listening])


def _state(engine: Engine) -> dict[str, int]:
    with Session(engine) as session:
        return {
            "items": session.scalar(select(func.count()).select_from(Item)) or 0,
            "raters": session.scalar(select(func.count()).select_from(Rater)) or 0,
            "assignments": session.scalar(select(func.count()).select_from(Assignment)) or 0,
            "answers": session.scalar(select(func.count()).where(~Answer.withdrawn)) or 0,
        }
