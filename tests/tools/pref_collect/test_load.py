"""Fifty raters at once, SIGKILL, a full disk: what was acknowledged is stored, once, and overlap is exact."""

from __future__ import annotations

import asyncio
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

RATERS = 50
JSON = {"accept": "application/json"}


class Load:
    """Fifty raters who answer as fast as they can until nothing is left or the server is gone."""

    def __init__(self, served: Any) -> None:
        self.tokens = served.tokens
        self.cookies: dict[str, httpx.Cookies] = {}
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.unsure: list[tuple[str, dict[str, str]]] = []

    def run(self, served: Any, kill_after: int | None = None) -> None:
        self.kill_after = kill_after
        # In a thread of its own: Playwright's event loop may be running in this one.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(self._all(served))).result()

    async def _all(self, served: Any) -> None:
        limits = httpx.Limits(max_connections=1)
        async with asyncio.TaskGroup() as group:
            for name, token in self.tokens.items():
                client = httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits, verify=False)
                group.create_task(self._rate(served, client, name, token))

    async def _rate(self, served: Any, client: httpx.AsyncClient, name: str, token: str) -> None:
        async with client:
            try:
                if name not in self.cookies:
                    assert (await client.post("/login", data={"token": token})).status_code == 303
                    self.cookies[name] = client.cookies
                client.cookies = self.cookies[name]
                while await self._one(served, client, name):
                    pass
            except httpx.TransportError:
                assert self.kill_after is not None

    async def _one(self, served: Any, client: httpx.AsyncClient, name: str) -> bool:
        html = (await client.get("/")).raise_for_status().text
        fields = dict(re.findall(r'name="(csrf|assignment_id)" value="([^"]*)"', html))
        if "assignment_id" not in fields:
            return False
        submission = str(uuid.uuid4())
        data = {**fields, "submission_id": submission, "choice": random.choice("321")}
        self.unsure.append((name, data))
        response = await client.post("/answer", data=data, headers=JSON)
        self.unsure.remove((name, data))
        assert response.status_code == 200, response.text
        self.acknowledged[submission] = (name, int(fields["assignment_id"]))
        if self.kill_after is not None and len(self.acknowledged) == self.kill_after:
            served.process.send_signal(signal.SIGKILL)
        return True


def rows(url: str, query: str) -> list[Any]:
    from sqlalchemy import text

    from tuneutils.tools.pref_collect.db import open_engine

    engine = open_engine(url)
    with engine.connect() as connection:
        found = [tuple(row) for row in connection.execute(text(query))]
    engine.dispose()
    return found


def check_exact(db: str, load: Load, items: int, overlap: int) -> None:
    stored = rows(
        db,
        "SELECT submission_id, rater.name, assignment.id, item_id FROM answer"
        " JOIN assignment ON assignment.id = assignment_id JOIN rater ON rater.id = rater_id",
    )
    by_submission = {s: (name, assignment) for s, name, assignment, _ in stored}
    assert load.acknowledged.items() <= by_submission.items(), "an acknowledged click is lost"
    assert set(Counter(item for *_, item in stored).values()) == {overlap}
    assert len({item for *_, item in stored}) == items
    assert len({(name, item) for _, name, _, item in stored}) == len(stored), "an item twice to one rater"


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: Any, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(request.getfixturevalue("postgres"))


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of an empty database of a real PostgreSQL server of our own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL server is installed (apt-get install postgresql)")
    pytest.importorskip("psycopg")
    yield from run_postgres(found[-1].parent)


def run_postgres(binaries: Path) -> Iterator[str]:
    import shutil
    import socket
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = str(folder / "data")

    def call(*line: str) -> None:
        done = subprocess.run([*as_user, *line], capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr

    call(str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "postgres")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    call(str(binaries / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql://postgres:hunter2@127.0.0.1:{port}/postgres"
    finally:
        call(str(binaries / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_fifty_raters_at_once(serve: Callable[..., Any], candidates: Any, db: str) -> None:
    served = serve(candidates(40), "--overlap", "5", raters=RATERS, db=db)
    load = Load(served)
    load.run(served)
    assert len(load.acknowledged) == 200
    check_exact(db, load, 40, 5)
    assert "hunter2" not in served.stop()


def test_sigkill_under_load_loses_no_click(serve: Callable[..., Any], candidates: Any, db: str) -> None:
    records = candidates(40)
    served = serve(records, "--overlap", "5", raters=RATERS, db=db)
    load = Load(served)
    load.run(served, kill_after=90)
    assert 90 <= len(load.acknowledged) < 200
    stored = dict(rows(db, "SELECT submission_id, 1 FROM answer"))
    assert load.acknowledged.keys() <= stored.keys()

    again = serve(records, "--overlap", "5", raters=RATERS, db=db)
    assert again.tokens == {}, "the tokens are still the old ones"
    for name, data in load.unsure:  # what browsers do that never heard back
        with httpx.Client(base_url=again.url, cookies=load.cookies[name]) as client:
            response = client.post("/answer", data=data, headers=JSON)
        assert response.status_code == 200, response.text
        load.acknowledged[data["submission_id"]] = (name, int(data["assignment_id"]))
    load.unsure.clear()
    load.run(again)
    assert len(load.acknowledged) == 200
    check_exact(db, load, 40, 5)


def test_a_full_disk_acknowledges_nothing_that_is_not_stored(
    serve: Callable[..., Any], candidates: Any, tmp_path: Path
) -> None:
    """The server's files may not grow any further: what write(2) refuses is never confirmed."""
    served = serve(candidates(60))
    rater = served.client(served.tokens["rater-0"])
    wal = tmp_path / "study.db-wal"
    limit = wal.stat().st_size + 30_000
    before = resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    acknowledged = 0
    response = None
    for _ in range(60):
        try:
            page = rater.page()
        except httpx.HTTPStatusError as exc:  # handing out the next item is refused as well
            response = exc.response
            break
        response = rater.answer(page, reason="x" * 2000)
        if response.status_code != 200:
            break
        acknowledged += 1
    assert response is not None
    assert response.status_code == 507
    assert "disk is full" in response.text
    assert "Traceback" not in response.text
    resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, before)
    assert rater.answer(rater.page()).status_code == 200, "it goes on once there is space"
    said = served.stop()
    assert said.count("cannot be written") >= 1
    with sqlite3.connect(tmp_path / "study.db") as stored:
        assert stored.execute("SELECT count(*) FROM answer").fetchone() == (acknowledged + 1,)
        assert stored.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_file_system(serve: Callable[..., Any], candidates: Any, tmp_path: Path) -> None:
    """The same on a real file system of one megabyte, where the kernel says ENOSPC."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges")
    try:
        served = serve(candidates(60), db=f"sqlite:///{small / 'study.db'}")
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        (small / "ballast").write_bytes(b"")
        with open(small / "ballast", "wb", buffering=0) as ballast:
            try:
                while ballast.write(b"x" * 4096):
                    pass
            except OSError:
                pass
        response = rater.answer(page, reason="x" * 8000)
        assert response.status_code == 507
        (small / "ballast").unlink()
        assert rater.answer(page, reason="x" * 8000).status_code == 200
        served.stop()
        with sqlite3.connect(small / "study.db") as stored:
            assert stored.execute("SELECT count(*) FROM answer").fetchone() == (1,)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_a_database_that_is_gone(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt":"p","completion_a":"a","completion_b":"b"}\n')
    url = "postgresql://someone:hunter2@127.0.0.1:9/x"
    done = cli("pref-collect", "serve", tmp_path / "c.jsonl", "--db", url, "--port", "0")
    assert done.code == 75, done.stderr
    assert done.error.startswith("postgresql://127.0.0.1/x: cannot connect")
    assert "hunter2" not in done.stdout + done.stderr
