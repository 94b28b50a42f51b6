"""How long raters wait: answers acknowledged and pages served, with fifty raters at once on a real server.

    python benchmarks/pref_collect_load.py --out pref_collect_load.json
    python benchmarks/pref_collect_load.py --think-s 0        # as fast as it goes
    python benchmarks/pref_collect_load.py --db postgresql://postgres@localhost/bench

An answer's latency is from sending the click until the acknowledgement has arrived, which the server sends
after its commit. Raters pause ``--think-s`` seconds in the mean (exponential), far less than people do; the
first is drawn too, so that they do not start in step. The floor is a bare commit of one row by SQLite with
the same settings on the same disk, with nothing else running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

FIELDS = re.compile(r'name="(csrf|assignment_id)" value="([^"]*)"')


class Connection:
    """One kept-alive HTTP connection, light enough not to compete with the server for the cores."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port, self.cookie = host, port, ""

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)

    async def request(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        body = urlencode(form or {}).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nAccept: application/json, */*\r\n"
        )
        head += f"Cookie: {self.cookie}\r\n" if self.cookie else ""
        head += "Content-Type: application/x-www-form-urlencoded\r\n" if form else ""
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        headers = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        found = re.search(r"content-length: (\d+)", headers, re.IGNORECASE)
        text = (await self.reader.readexactly(int(found[1]))).decode() if found else ""
        cookie = re.search(r"set-cookie: ([^;]+)", headers, re.IGNORECASE)
        if cookie:
            self.cookie = cookie[1]
        return int(headers.split()[1]), text


async def rate(
    connection: Connection, token: str, args: argparse.Namespace, times: dict[str, list[float]]
) -> None:
    await connection.open()
    status, _ = await connection.request("POST", "/login", {"token": token})
    assert status == 303, status
    for _ in range(args.answers):
        if args.think_s:
            await asyncio.sleep(random.expovariate(1 / args.think_s))
        start = time.perf_counter()
        status, html = await connection.request("GET", "/")
        times["page"].append(time.perf_counter() - start)
        assert status == 200, status
        fields = dict(FIELDS.findall(html))
        form = {**fields, "submission_id": str(uuid.uuid4()), "choice": random.choice(["3", "0", "-2"])}
        start = time.perf_counter()
        status, text = await connection.request("POST", "/answer", form)
        times["answer"].append(time.perf_counter() - start)
        assert status == 200, text


def floor_s(folder: Path) -> float:
    """The median time of a bare commit of one row."""
    with sqlite3.connect(folder / "floor.db", isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE t (x TEXT)")
        times = []
        for _ in range(200):
            start = time.perf_counter()
            db.execute("INSERT INTO t VALUES (?)", ("x" * 200,))
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def start_server(folder: Path, args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str, list[str]]:
    items = args.raters * args.answers // args.overlap + args.raters
    lines = (
        json.dumps(
            {"prompt": f"Question {i}? " * 20, "completion_a": f"Yes {i}. " * 60, "completion_b": "No. " * 60}
        )
        for i in range(items)
    )
    (folder / "candidates.jsonl").write_text("\n".join(lines) + "\n")
    line = [
        sys.executable,
        "-m",
        "tuneutils.tools.pref_collect.cli",
        "serve",
        str(folder / "candidates.jsonl"),
    ]
    line += ["--db", args.db or str(folder / "study.db"), "--port", "0", "--overlap", str(args.overlap)]
    line += ["--requests-per-s", "1000", *(a for i in range(args.raters) for a in ("--rater", f"rater-{i}"))]
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(line, stdout=out, stderr=err)
    while not (found := re.search(r"listening on (\S+)", (folder / "err").read_text())):
        assert process.poll() is None, (folder / "err").read_text()
        time.sleep(0.05)
    tokens = [json.loads(row)["token"] for row in (folder / "out").read_text().splitlines()]
    return process, found[1], tokens


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def milliseconds(times: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {
        "median_ms": round(1e3 * cuts[49], 2),
        "p95_ms": round(1e3 * cuts[94], 2),
        "max_ms": round(1e3 * max(times), 2),
    }


async def load(url: str, tokens: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"page": [], "answer": []}
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 0
    async with asyncio.TaskGroup() as group:
        for token in tokens:
            group.create_task(rate(Connection(host, port), token, args, times))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--answers", type=int, default=20, help="of each rater")
    parser.add_argument("--think-s", type=float, default=2.0)
    parser.add_argument("--overlap", type=int, default=3)
    parser.add_argument("--db", help="an empty database in place of an SQLite file")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        floor = floor_s(Path(name))
        process, url, tokens = start_server(Path(name), args)
        try:
            before, start = cpu_s(process.pid), time.perf_counter()
            times = asyncio.run(load(url, tokens, args))
            wall, cpu = time.perf_counter() - start, cpu_s(process.pid) - before
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)
    found: dict[str, Any] = {
        "raters": args.raters,
        "answers": len(times["answer"]),
        "answers_per_s": round(len(times["answer"]) / wall, 1),
        "answer": milliseconds(times["answer"]),
        "page": milliseconds(times["page"]),
        "server_cpu_ms_per_answer_and_page": round(1e3 * cpu / len(times["answer"]), 2),
        "bare_commit_median_ms": round(1e3 * floor, 2),
        "cpus": os.cpu_count(),
    }
    print(json.dumps(found, indent=2))
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
