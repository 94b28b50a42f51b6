"""The server as a client meets it: logins, forged and oversized requests, idempotence, undo, leases."""

from __future__ import annotations

import re
import shutil
import socket
import sqlite3
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support import write_jsonl

from tuneutils.tools.pref_collect.security import Limiter

JSON = {"accept": "application/json"}


def stored(tmp_path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(tmp_path / "study.db") as db:
        return db.execute("SELECT submission_id, withdrawn FROM answer ORDER BY id").fetchall()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate of this machine, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(
        [*line.split(), *names, "-out", cert, "-keyout", key], check=True, capture_output=True, timeout=60
    )
    return cert, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_with_a_certificate_of_ones_own(
    serve: Callable[..., Any], candidates: Any, tmp_path: Path
) -> None:
    """The certificate verifies, the cookie is for HTTPS and this host alone, and an answer is stored."""
    cert, key = certificate(tmp_path)
    served = serve(candidates(1), "--tls-cert", str(cert), "--tls-key", str(key))
    assert served.url.startswith("https://")
    with httpx.Client(base_url=served.url) as stranger, pytest.raises(httpx.ConnectError, match="verify"):
        stranger.get("/login")
    rater = served.client(served.tokens["rater-0"], verify=ssl.create_default_context(cafile=str(cert)))
    cookie = rater.login.headers["set-cookie"]
    assert cookie.startswith("__Host-pref-collect=")
    assert "secure" in cookie.lower()
    assert "max-age=" in rater.login.headers["strict-transport-security"]
    assert rater.answer(rater.page()).status_code == 200
    assert len(stored(tmp_path)) == 1


class TestLogin:
    def test_token_is_needed(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1))
        with httpx.Client(base_url=served.url) as nobody:
            assert nobody.get("/").headers["location"] == "/login"
            assert nobody.post("/answer", data={"choice": "1"}, headers=JSON).status_code == 401
            assert nobody.post("/undo", data={"answer_id": "1"}).headers["location"] == "/login"
            for wrong in (
                "",
                "1",
                "1.",
                "x",
                "1.wrong",
                served.tokens["rater-0"][:-1],
                "9" * 30 + ".x",
                "².",
            ):
                response = nobody.post("/login", data={"token": wrong})
                assert response.status_code == 401, wrong
                assert "set-cookie" not in response.headers

    def test_a_stolen_cookie_ends_with_the_token(
        self, serve: Callable[..., Any], candidates: Any, cli: Callable[..., Any], tmp_path: Path
    ) -> None:
        served = serve(candidates(2))
        rater = served.client(served.tokens["rater-0"])
        assert rater.http.get("/").status_code == 200
        made = cli("pref-collect", "tokens", "rater-0", "--renew", "--db", tmp_path / "study.db").stdout
        assert rater.http.get("/").headers["location"] == "/login"
        assert served.client(served.tokens["rater-0"]).login.status_code == 401
        assert '"rater": "rater-0"' in made
        with httpx.Client(base_url=served.url, cookies={"pref-collect": "guess"}) as thief:
            assert thief.get("/").status_code == 303

    def test_cookie_and_headers(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        cookie = rater.login.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        headers = rater.http.get("/").headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers
        html = rater.page()["html"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", html)

    def test_logout(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        cookies = dict(rater.http.cookies)
        page = rater.page()
        assert rater.http.post("/logout", data={"csrf": page["csrf"]}).status_code == 303
        with httpx.Client(base_url=served.url, cookies=cookies) as old:
            assert old.get("/").status_code == 303

    def test_guessing_is_slowed_down(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1))
        with httpx.Client(base_url=served.url) as thief:
            codes = [thief.post("/login", data={"token": f"1.{i}"}).status_code for i in range(15)]
        assert codes[:10] == [401] * 10
        assert codes[-1] == 429

    def test_nothing_secret_is_written(
        self, serve: Callable[..., Any], candidates: Any, tmp_path: Path
    ) -> None:
        served = serve(candidates(2), "-v")
        token = served.tokens["rater-0"]
        rater = served.client(token)
        page = rater.page()
        rater.answer(page)
        rater.http.post("/answer", data={"csrf": "wrong"}, headers=JSON)
        said = served.stop()
        cookie = rater.http.cookies["pref-collect"]
        database = b"".join(p.read_bytes() for p in tmp_path.glob("study.db*"))
        for secret in (token.split(".")[1], cookie, page["csrf"]):
            assert secret not in said
            assert secret.encode() not in database


class TestForged:
    def test_without_csrf_token(self, serve: Callable[..., Any], candidates: Any, tmp_path: Path) -> None:
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        for csrf in ("", "0" * 64, "é"):
            response = rater.answer({**page, "csrf": csrf})
            assert response.status_code == 403
        assert rater.undo({"csrf": "", "answer_id": "1"}).status_code == 403
        assert stored(tmp_path) == []

    def test_from_another_site(self, serve: Callable[..., Any], candidates: Any, tmp_path: Path) -> None:
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        for header in ({"sec-fetch-site": "cross-site"}, {"origin": "https://evil.example"}):
            rater.http.headers = httpx.Headers(header)
            assert rater.answer(page).status_code == 403
            assert rater.http.post("/login", data={"token": served.tokens["rater-0"]}).status_code == 403
        assert stored(tmp_path) == []

    def test_by_another_name(self, serve: Callable[..., Any], candidates: Any) -> None:
        """DNS rebinding: a name of the attacker's that leads to loopback."""
        served = serve(candidates(1))
        port = urlsplit(served.url).port
        assert httpx.get(served.url + "/login", headers={"host": f"evil.example:{port}"}).status_code == 421
        assert httpx.get(f"http://localhost:{port}/login").status_code == 200

    def test_another_raters_question(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(2), raters=2)
        one, two = (served.client(t) for t in served.tokens.values())
        theirs, own = one.page(), two.page()
        assert two.answer({**own, "assignment_id": theirs["assignment_id"]}).status_code == 404
        assert one.answer(theirs).status_code == 200
        theirs = one.page()
        assert two.undo({"csrf": own["csrf"], "answer_id": theirs["answer_id"]}).status_code == 404

    @pytest.mark.parametrize(
        "fields",
        [
            {"choice": ""},
            {"choice": "4"},
            {"choice": "2.0"},
            {"choice": "²"},
            {"choice": "2", "aspect-0": "9"},
            {"choice": "2", "reason": "x" * 20_001},
        ],
    )
    def test_what_is_not_on_the_scale(
        self, serve: Callable[..., Any], candidates: Any, fields: dict[str, str], tmp_path: Path
    ) -> None:
        served = serve(candidates(1), "--aspect", "helpful")
        rater = served.client(served.tokens["rater-0"])
        choice = fields.pop("choice")
        response = rater.answer(rater.page(), choice, **fields)
        assert response.status_code == 422
        assert response.json()["error"]
        assert stored(tmp_path) == []

    def test_odd_requests(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        fields = {"csrf": page["csrf"], "choice": "1"}
        answers = [
            rater.http.post("/answer", data={**fields, "assignment_id": "x"}),
            rater.http.post("/answer", data={**fields, "assignment_id": "1" * 20}),
            rater.http.post("/answer", data={**fields, "assignment_id": "1", "submission_id": "'; --"}),
            rater.http.post("/answer", json=fields),
            rater.http.post("/answer", files={"csrf": b"x"}),
            rater.http.post(
                "/answer", content=b"a=1&a=2", headers={"content-type": "application/x-www-form-urlencoded"}
            ),
            rater.http.get("/answer"),
            rater.http.get("/nothing"),
            rater.http.get("/static/../web.py"),
            rater.http.get("/static/%2e%2e/web.py"),
        ]
        assert [a.status_code for a in answers] == [400, 400, 400, 400, 400, 400, 405, 404, 404, 404]
        assert not any("Traceback" in a.text or "tools/" in a.text for a in answers)


class TestBody:
    def test_too_long(self, serve: Callable[..., Any], candidates: Any, tmp_path: Path) -> None:
        served = serve(candidates(1), "--max-body-kib", "16")
        rater = served.client(served.tokens["rater-0"])
        response = rater.answer(rater.page(), reason="x" * 17_000)
        assert response.status_code == 413
        assert stored(tmp_path) == []

    def test_too_long_without_a_length(
        self, serve: Callable[..., Any], candidates: Any, tmp_path: Path
    ) -> None:
        served = serve(candidates(1), "--max-body-kib", "16")
        rater = served.client(served.tokens["rater-0"])

        def chunks() -> Any:
            yield b"csrf=x&reason="
            for _ in range(40):
                yield b"x" * 1024

        headers = {"content-type": "application/x-www-form-urlencoded", **JSON}
        response = rater.http.post("/answer", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert stored(tmp_path) == []

    def test_cut_off(self, serve: Callable[..., Any], candidates: Any, tmp_path: Path) -> None:
        """A phone that loses its connection half way through a request stores nothing and stops nothing."""
        served = serve(candidates(1))
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        cookie = rater.http.cookies["pref-collect"]
        with socket.create_connection((urlsplit(served.url).hostname, urlsplit(served.url).port)) as raw:
            raw.sendall(
                f"POST /answer HTTP/1.1\r\nHost: localhost\r\nCookie: pref-collect={cookie}\r\n"
                "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 500\r\n\r\n"
                f"csrf={page['csrf']}&choice=1".encode()
            )
        assert rater.answer(page).status_code == 200
        assert len(stored(tmp_path)) == 1
        assert "bug" not in served.stop()


class TestRate:
    def test_one_rater_cannot_flood(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(1), "--requests-per-s", "0.5", raters=2)
        one, two = (served.client(t) for t in served.tokens.values())
        codes = [one.http.get("/").status_code for _ in range(8)]
        assert codes[0] == 200
        assert codes[-1] == 429
        assert two.http.get("/").status_code == 200, "others are not held up"

    def test_a_bucket_fills_again(self) -> None:
        now = [0.0]
        limiter = Limiter(per_s=2, burst=3, clock=lambda: now[0], max_keys=2)
        assert [limiter.take("a") for _ in range(4)] == [True, True, True, False]
        now[0] = 0.5
        assert [limiter.take("a") for _ in range(2)] == [True, False]
        assert [limiter.take(k) for k in "bc"] == [True, True]
        assert len(limiter._buckets) == 2


class TestAnswers:
    def test_a_doubled_submit_is_stored_once(
        self, serve: Callable[..., Any], candidates: Any, tmp_path: Path
    ) -> None:
        served = serve(candidates(2))
        rater = served.client(served.tokens["rater-0"])
        page = rater.page()
        name = str(uuid.uuid4())
        first = rater.answer(page, "2", submission_id=name)
        again = rater.answer(page, "2", submission_id=name)
        assert first.json() == again.json()
        assert stored(tmp_path) == [(name, 0)]
        changed = rater.answer(page, "3", submission_id=name)
        other = rater.answer(page, "3")
        assert (changed.status_code, other.status_code) == (409, 409)
        assert stored(tmp_path) == [(name, 0)]

    def test_undo_twice_withdraws_one(
        self, serve: Callable[..., Any], candidates: Any, tmp_path: Path
    ) -> None:
        served = serve(candidates(3))
        rater = served.client(served.tokens["rater-0"])
        for _ in range(2):
            assert rater.answer(rater.page()).status_code == 200
        page = rater.page()
        assert rater.undo(page).status_code == 200
        assert rater.undo(page).status_code == 200
        assert [withdrawn for _, withdrawn in stored(tmp_path)] == [0, 1]
        assert rater.page()["assignment_id"] == "2"
        assert rater.answer(rater.page(), "-1").status_code == 200
        assert [withdrawn for _, withdrawn in stored(tmp_path)] == [0, 1, 0]

    def test_a_reload_shows_the_same_question(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(5))
        rater = served.client(served.tokens["rater-0"])
        shown = {re.search(r"Question \d", rater.page()["html"])[0] for _ in range(3)}
        assert len(shown) == 1

    def test_what_waits_too_long_goes_to_someone_else(
        self, serve: Callable[..., Any], candidates: Any
    ) -> None:
        served = serve(candidates(1), "--lease-minutes", "0.02", raters=2)
        one, two = (served.client(t) for t in served.tokens.values())
        abandoned = one.page()
        assert "assignment_id" not in two.page()
        time.sleep(1.3)
        taken = two.page()
        assert "assignment_id" in taken
        late = one.answer(abandoned)
        assert (late.status_code, "given to someone else" in late.json()["error"]) == (410, True)
        assert two.answer(taken).status_code == 200
        assert "assignment_id" not in one.page()

    def test_nothing_on_the_page_tells_the_source(self, serve: Callable[..., Any], candidates: Any) -> None:
        records = candidates(4, model_a="teacher", model_b="student", score_a=0.125)
        records[0]["gold"] = records[1]["gold"] = "a"
        served = serve(records, "--gold-every", "2")
        rater = served.client(served.tokens["rater-0"])
        for _ in range(4):
            page = rater.page()
            if "assignment_id" not in page:
                break
            for word in (
                "teacher",
                "student",
                "0.125",
                "gold",
                "completion",
                "swapped",
                "chosen",
                "q0",
                "q1",
            ):
                assert word not in page["html"]
            rater.answer(page)


class TestStart:
    def test_the_same_command_goes_on(self, serve: Callable[..., Any], candidates: Any) -> None:
        served = serve(candidates(3))
        rater = served.client(served.tokens["rater-0"])
        rater.answer(rater.page())
        assert "1 answers are stored" in served.stop()
        again = serve(candidates(3))
        assert "1 of 3 answered" in again.client(served.tokens["rater-0"]).page()["html"]
        assert again.tokens == {}

    def test_another_study_is_refused(
        self, cli: Callable[..., Any], serve: Callable[..., Any], candidates: Any, tmp_path: Path
    ) -> None:
        serve(candidates(3), "--overlap", "2").stop()
        other = write_jsonl(tmp_path / "other.jsonl", candidates(4))
        same = write_jsonl(tmp_path / "same.jsonl", candidates(3))
        base = ("serve", "--db", tmp_path / "study.db", "--port", "0")
        for args, says in (
            ((other,), "other candidates"),
            ((same, "--overlap", "2", "--aspect", "x"), "begun with --aspect"),
            ((same, "--overlap", "2", "--seed", "3"), "begun with --seed"),
            ((same, "--overlap", "1"), "it can only grow"),
        ):
            done = cli("pref-collect", *base, *args)
            assert (done.code, says in done.error) == (65, True), done.stderr

    @pytest.mark.parametrize(
        ("args", "code", "says"),
        [
            (("--host", "0.0.0.0"), 2, "add --allow-remote"),
            (("--tls-cert", "x.pem"), 2, "go together"),
            (("--db", "mysql://x/y"), 2, "only sqlite:///FILE and postgresql://"),
            (("--db", "/nosuch/folder/x.db"), 73, "cannot write"),
            (("--guidelines", "nosuch.txt"), 66, "nosuch.txt"),
            (("--rater", "a\nb"), 2, "printable"),
        ],
    )
    def test_usage(
        self, cli: Callable[..., Any], candidates: Any, workdir: Path, args: Any, code: int, says: str
    ) -> None:
        write_jsonl(Path("c.jsonl"), candidates(1))
        done = cli("pref-collect", "serve", "c.jsonl", "--port", "0", *args)
        assert (done.code, says in done.error) == (code, True), done.stderr

    def test_not_a_database(self, cli: Callable[..., Any], candidates: Any, workdir: Path) -> None:
        write_jsonl(Path("c.jsonl"), candidates(1))
        Path("letter.txt").write_text("Dear Sir or Madam, " * 100)
        done = cli("pref-collect", "serve", "c.jsonl", "--db", "letter.txt", "--port", "0")
        assert (done.code, "letter.txt: no database" in done.error) == (65, True), done.stderr
        assert Path("letter.txt").read_text().startswith("Dear")
