"""Wheels and sdists straight from a package index: found, checked and stored, never built or run.

``pip download`` of an sdist runs its build backend to learn its metadata; here only the index (PEP 503 and
PEP 691, JSON or HTML) is read. Index, find-links, certificate and credentials are pip's own configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError

_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_SDIST = (".tar.gz", ".zip", ".tar.bz2", ".tgz")


@dataclass(frozen=True)
class IndexFile:
    """A package file as an index lists it."""

    name: str
    url: str
    sha256: str | None


def normalised(name: str) -> str:
    """The name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_files(name: str, version: str) -> tuple[dict[str, Path], Any] | None:
    """Files and metadata of the installed package, if it is installed in just this version."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    if found.version != version or not found.files:
        return None
    located = {str(f): Path(str(found.locate_file(f))) for f in found.files if ".." not in f.parts}
    return {n: p for n, p in located.items() if p.is_file()}, found.metadata


def find(name: str, version: str, variant: str) -> IndexFile | None:
    """The wheel or sdist of a version on the configured indexes; None when the version has no such file.

    Raises:
        ToolError: no such package or version (66), an index cannot be reached (75).
    """
    settings = pip_settings()
    listed = list(_listed(name, settings))
    if not listed:
        raise ToolError(f"pypi:{name}: no such package on the index", code=ExitCode.MISSING_INPUT)
    here = [f for f in listed if _version(f.name, name) == _canonical(version)]
    if not here:
        versions = sorted({v for f in listed if (v := _version(f.name, name))}, key=_sortable)
        raise ToolError(
            f"pypi:{name}=={version}: no such version; the newest are {', '.join(versions[-4:])}",
            code=ExitCode.MISSING_INPUT,
        )
    if variant == "sdist":
        return next((f for f in here if f.name.endswith(_SDIST)), None)
    return _best_wheel([f for f in here if f.name.endswith(".whl")])


def _best_wheel(wheels: list[IndexFile]) -> IndexFile | None:
    """The pure wheel; else the one that installs here; else the first by name."""
    pure = [f for f in wheels if f.name.endswith("-none-any.whl")]
    if pure or len(wheels) < 2:
        return next(iter(pure or wheels), None)
    from packaging.tags import sys_tags
    from packaging.utils import parse_wheel_filename

    rank = {tag: i for i, tag in enumerate(sys_tags())}
    return min(
        wheels, key=lambda f: (min(rank.get(t, 1 << 30) for t in parse_wheel_filename(f.name)[3]), f.name)
    )


def _version(filename: str, name: str) -> str | None:
    """The version in a file name, canonical; None for another project's file or another kind."""
    if filename.endswith(".whl"):
        project, version = [*filename.split("-"), ""][:2]
    else:
        suffix = next((s for s in _SDIST if filename.endswith(s)), None)
        if suffix is None:
            return None
        project, _, version = filename.removesuffix(suffix).rpartition("-")
    return _canonical(version) if normalised(project) == normalised(name) else None


def _canonical(version: str) -> str:
    """``1.0`` and ``1.0.0`` are the same version; ``_`` in a wheel's name stands for ``+``'s ``.``."""
    text = re.sub(r"(\.0)+$", "", version.lower().replace("_", "."))
    return text or version


def _sortable(version: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"[.+-]", version)]


def _listed(name: str, settings: Mapping[str, str]) -> Iterator[IndexFile]:
    for place in settings.get("find-links", "").split():
        yield from _linked(place, settings)
    indexes = [settings.get("index-url") or _default_index()] if "no-index" not in settings else []
    for index in indexes + settings.get("extra-index-url", "").split():
        page = f"{index.rstrip('/')}/{normalised(name)}/"
        body = _get(page, settings)
        if body is not None:
            yield from parse_page(body, page)


def _default_index() -> str:
    """The index that pip itself uses when none is configured."""
    from pip._internal.models.index import PyPI

    return str(PyPI.simple_url)


def _linked(place: str, settings: Mapping[str, str]) -> Iterator[IndexFile]:
    folder = Path(place.removeprefix("file://"))
    if folder.is_dir():
        yield from (IndexFile(p.name, p.absolute().as_uri(), None) for p in sorted(folder.iterdir()))
    elif "://" in place and (body := _get(place, settings)) is not None:
        yield from parse_page(body, place)


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def parse_page(body: bytes, page: str) -> list[IndexFile]:
    """The files on a project's index page, JSON (PEP 691) or HTML (PEP 503)."""
    if body.lstrip().startswith(b"{"):
        files = json.loads(body)["files"]
        return [
            IndexFile(f["filename"], urllib.parse.urljoin(page, f["url"]), f.get("hashes", {}).get("sha256"))
            for f in files
        ]
    anchors = _Anchors()
    anchors.feed(body.decode("utf-8", errors="replace"))
    found = []
    for href in anchors.links:
        url, _, fragment = urllib.parse.urljoin(page, href).partition("#")
        name = urllib.parse.unquote(url.rpartition("/")[2])
        found.append(
            IndexFile(name, url, fragment.removeprefix("sha256=") if "sha256=" in fragment else None)
        )
    return found


def download(found: IndexFile, target: Path) -> None:
    """Fetch a package file, checked against the index's hash.

    Raises:
        ToolError: the content differs (65), the host cannot be reached (75).
    """
    digest = hashlib.sha256()
    try:
        with _open(found.url, pip_settings()) as response, open(target, "wb") as sink:
            while block := response.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as exc:
        raise _unreachable(found.url, exc) from exc
    if found.sha256 and digest.hexdigest() != found.sha256:
        raise ToolError(f"{found.name}: SHA-256 is {digest.hexdigest()}, the index says {found.sha256}")


def _get(url: str, settings: Mapping[str, str]) -> bytes | None:
    """A page's body; None when there is no such page."""
    if url.startswith("file://"):
        folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
        page = folder / "index.html" if folder.is_dir() else folder
        return page.read_bytes() if page.is_file() else None
    try:
        with _open(url, settings) as response:
            body: bytes = response.read()
            return body
    except urllib.error.HTTPError as exc:
        if exc.code in (404, 410):
            return None
        raise _unreachable(url, exc) from exc
    except (urllib.error.URLError, TimeoutError, ConnectionError) as exc:
        raise _unreachable(url, exc) from exc


def _open(url: str, settings: Mapping[str, str]):  # type: ignore[no-untyped-def]
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": _ACCEPT if url.endswith("/") else "*/*", "User-Agent": "tuneutils"}
    if parts.username:
        import base64

        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        host = parts.hostname or ""
        url = parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host).geturl()
    context = ssl.create_default_context(cafile=settings.get("cert")) if parts.scheme == "https" else None
    timeout = float(settings.get("timeout", settings.get("default-timeout", "60")))
    return urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=timeout, context=context
    )


def _unreachable(url: str, exc: Exception) -> ToolError:
    shown = urllib.parse.urlsplit(url)._replace(query="", fragment="")
    where = shown._replace(netloc=shown.netloc.rpartition("@")[2]).geturl()
    reason = getattr(exc, "reason", None) or exc
    return ToolError(
        f"{where}: cannot be reached ({reason}); check the network and: python -m pip config list",
        code=ExitCode.RETRYABLE,
    )


def pip_settings() -> dict[str, str]:
    """pip's settings by plain name; its environment variables win over its files."""
    found: dict[str, str] = {}
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "download"):
            found[name] = value.strip("'\"").replace("\\n", " ")
    for key, value in os.environ.items():
        if key.startswith("PIP_"):
            found[key[4:].lower().replace("_", "-")] = value
    return found
