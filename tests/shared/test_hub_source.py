"""Hub sources through the real client, against a small server on this machine that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from support import Result

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repositories = dict[str, dict[str, bytes]]


def handler(repositories: Repositories, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """A handler that serves ``models/org/name`` and ``datasets/org/name`` at one commit."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(path)
            if path.startswith("api/"):
                self.api(path.removeprefix("api/"))
            else:
                self.file(path)

        do_HEAD = do_GET

        def api(self, path: str) -> None:
            name = "/".join(path.split("/")[:3])
            rest = path.split("/")[3:]
            if name not in repositories:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[1:] and rest[1] not in ("main", COMMIT):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["tree"]:
                files = [
                    {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for f, c in repositories[name].items()
                ]
                self.answer(200, json.dumps(files).encode())
            else:
                siblings = [{"rfilename": f} for f in repositories[name]]
                card = {"license": "apache-2.0"}
                info = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings, "cardData": card}
                self.answer(200, json.dumps(info).encode())

        def file(self, path: str) -> None:
            kind = "" if path.startswith("datasets/") else "models/"
            parts = (kind + path).split("/")
            files = repositories.get("/".join(parts[:3]), {})
            content = files.get("/".join(parts[5:]))
            if content is None:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

        def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub() -> Iterator[tuple[dict[str, str | None], Repositories, list[str]]]:
    """(environment that points the client to the server, its repositories, paths asked for)."""
    repositories: Repositories = {}
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(repositories, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": None,
        "HF_HUB_CACHE": None,
        "no_proxy": "127.0.0.1",
    }
    yield environment, repositories, asked
    server.shutdown()
    server.server_close()


def test_model_is_pinned_to_its_commit(
    hub: Any, cli: Callable[..., Result], tiny_model: Path, workdir: Path
) -> None:
    environment, repositories, asked = hub
    files = {p.name: p.read_bytes() for p in tiny_model.iterdir()}
    repositories["models/org/tiny"] = {**files, "pytorch_model.bin": b"\x80pickle", "evil.py": b"1/0"}
    done = cli("model-import", "org/tiny", "-o", "out", env=environment, cwd=workdir)
    assert done.code == 0, done.stderr
    manifest = json.loads((workdir / "out" / "artifact.json").read_text())
    assert manifest["source"] == f"hf:org/tiny@{COMMIT}"
    assert manifest["revision"] == COMMIT
    assert manifest["licence"] == "Apache-2.0"
    assert not [a for a in asked if a.endswith((".bin", ".py"))]
    assert (workdir / "out" / "model.safetensors").read_bytes() == files["model.safetensors"]
    pinned = f"org/tiny@{COMMIT}"
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    again = cli("model-import", pinned, "-o", "out", env=offline, cwd=workdir)
    assert again.code == 0, again.stderr
    assert "up to date" in again.stderr


def test_file_of_a_dataset(hub: Any, cli: Callable[..., Result], workdir: Path) -> None:
    environment, repositories, _ = hub
    repositories["datasets/org/data"] = {"a.jsonl": b'{"text": "a"}\n', "b.jsonl": b'{"text": "b"}\n'}
    done = cli("data-import", "hf:org/data@main!/a.jsonl", env=environment, cwd=workdir)
    assert done.stdout == '{"text": "a"}\n', done.stderr
    assert f"licence Apache-2.0; source hf:org/data@{COMMIT}!/a.jsonl" in done.stderr
    done = cli("data-import", "hf:org/data!/c.jsonl", env=environment, cwd=workdir)
    assert done.code == 66, done.stderr


def test_whole_dataset(hub: Any, cli: Callable[..., Result], workdir: Path) -> None:
    environment, repositories, _ = hub
    repositories["datasets/org/data"] = {
        "data/train-00000.jsonl": b'{"question": "q", "answer": "a", "n": 1}\n',
        "data/test-00000.jsonl": b'{"question": "p", "answer": "b", "n": 2}\n',
    }
    for split, prompt in (("train", "q"), ("test", "p")):
        done = cli("data-import", "org/data", "--hub-split", split, env=environment, cwd=workdir)
        assert done.code == 0, done.stderr
        assert json.loads(done.stdout)["prompt"] == prompt
    done = cli("data-import", "org/data", "--hub-split", "nothing", env=environment, cwd=workdir)
    assert done.code == 66, done.stderr
    assert "nothing" in done.error


@pytest.mark.parametrize("source", ["org/absent", "org/tiny@v9"])
def test_absent_repository_or_revision(
    hub: Any, cli: Callable[..., Result], workdir: Path, source: str
) -> None:
    environment, repositories, _ = hub
    repositories["models/org/tiny"] = {"config.json": b"{}"}
    done = cli("model-import", source, "-o", "out", env=environment, cwd=workdir)
    assert done.code == 66, done.stderr
    assert "no such model repository or revision" in done.error


def test_no_network_is_retryable(hub: Any, cli: Callable[..., Result], workdir: Path) -> None:
    environment = {**hub[0], "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = cli("model-import", "org/tiny@" + COMMIT, "-o", "out", env=environment, cwd=workdir)
    assert done.code == 75, done.stderr
    assert "cannot be reached" in done.error
