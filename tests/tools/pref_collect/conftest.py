"""A served study: a real process on a free port, and clients that act as raters' browsers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import environment, tool_args, write_jsonl

for _module in ("sqlalchemy", "starlette", "uvicorn", "jinja2"):
    pytest.importorskip(_module)

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def make_candidates(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}",
            "prompt": f"Question {i}?",
            "completion_a": f"Yes, {i}.",
            "completion_b": f"No {i}!",
            **extra,
        }
        for i in range(count)
    ]


@dataclass
class Served:
    """A running server.

    Attributes:
        tokens: rater → token, of those made at this start.
    """

    process: subprocess.Popen[bytes]
    url: str
    tokens: dict[str, str]
    stderr: Path

    def stop(self) -> str:
        """End it as Ctrl-C does; gives what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0
        return self.stderr.read_text()

    def client(self, token: str, **client: Any) -> Browser:
        return Browser(self, token, **client)


class Browser:
    """What a rater's browser does, without one: cookie, form fields, CSRF token."""

    def __init__(self, served: Served, token: str, **client: Any) -> None:
        self.http = httpx.Client(base_url=served.url, timeout=30, **client)
        self.login = self.http.post("/login", data={"token": token})

    def page(self) -> dict[str, str]:
        """The hidden fields of the page, and its text under ``html``; no ``assignment_id`` at the end."""
        html = self.http.get("/").raise_for_status().text
        found = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', html)
        return {"html": html, **dict(found)}

    def answer(self, page: dict[str, str], choice: str = "2", **fields: str) -> httpx.Response:
        data = {k: page[k] for k in ("csrf", "assignment_id")} | {"submission_id": str(uuid.uuid4())}
        return self.http.post(
            "/answer", data={**data, "choice": choice, **fields}, headers={"accept": "application/json"}
        )

    def undo(self, page: dict[str, str]) -> httpx.Response:
        data = {k: page[k] for k in ("csrf", "answer_id")}
        return self.http.post("/undo", data=data, headers={"accept": "application/json"})


@pytest.fixture
def candidates() -> Callable[..., list[dict[str, Any]]]:
    return make_candidates


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(records, *options, raters=1, db=…)`` → a ``Served``; all are ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        records: list[dict[str, Any]],
        *options: str,
        raters: int = 1,
        db: str | None = None,
        **popen: Any,
    ) -> Served:
        number = len(started)
        stream = write_jsonl(tmp_path / f"candidates-{number}.jsonl", records)
        out, err = tmp_path / f"stdout-{number}", tmp_path / f"stderr-{number}"
        line = [sys.executable, *tool_args("pref-collect"), "serve", str(stream)]
        line += ["--db", db or str(tmp_path / "study.db"), "--port", "0", *options]
        for i in range(raters):
            line += ["--rater", f"rater-{i}"]
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(line, stdout=stdout, stderr=stderr, env=environment(), **popen)
        started.append(process)
        return Served(process, _address(process, err), _tokens(out), err)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], stderr: Path) -> str:
    for _ in range(600):
        found = re.search(r"listening on (https?://\S+)", stderr.read_text())
        if found:
            return found[1]
        assert process.poll() is None, stderr.read_text()
        time.sleep(0.05)
    raise AssertionError(stderr.read_text())


def _tokens(stdout: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in stdout.read_text().splitlines()]
    return {row["rater"]: row["token"] for row in rows}


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium; absent, the test is skipped, but not under CI."""
    if not Path(CHROMIUM).exists() and not os.environ.get("CI"):
        pytest.skip(f"{CHROMIUM} is not installed (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield browser
        browser.close()
