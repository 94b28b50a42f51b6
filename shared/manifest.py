"""Manifests: what an artifact is, what it was made from, and whether it is still so.

``artifact.json`` names an artifact's kind, tool and version, parameters, inputs and files by SHA-256,
licences, seed, library versions and metrics. Nothing in it depends on time, host, device name or
process count: those go to the run log.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.streams import require_readable

MANIFEST = "artifact.json"
SCHEMA = 1
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "tokenizers",
    "gguf",
    "numpy",
)

#: Names of a URL's parameters whose values are secrets.
SECRET_NAME = re.compile(r"key|token|secret|pass|pwd|sig|auth|cred|code|session", re.IGNORECASE)
SECRET_SHOWN = "***"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """One thing that an artifact was made from.

    Attributes:
        role: what it was used as: ``model``, ``records``, ``heldout``, …
        path: as the user named it (``-`` for stdin).
        sha256: of the file; of an artifact, that of its manifest; of another folder, of its listing.
        kind, licence, source: carried over from the input's own manifest.
    """

    role: str
    path: str
    sha256: str
    kind: str | None = None
    licence: str | None = None
    source: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """SHA-256 over the sorted lines ``<sha256>  <relative path>`` of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(files_of(folder)):
        digest.update(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def files_of(folder: Path) -> Iterator[Path]:
    """The files below a folder, its own manifest left out."""
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / MANIFEST:
            yield path


def describe_input(role: str, path: str | os.PathLike[str]) -> Input:
    """Hash an input and take over what its own manifest says of it.

    A file's manifest is ``FILE.artifact.json`` beside it, or its folder's, if that lists it; a file
    that has changed since has none. Of a folder only the sizes are compared: its weights may be large.

    Raises:
        ToolError: nothing is there (66), or an artifact's files are not those of its manifest (65).
    """
    if str(path) == "-":
        return Input(role, "-", "")
    found = Path(path)
    require_readable(str(path))
    manifest_path = manifest_of(found)
    manifest = load_manifest(manifest_path) if manifest_path else {}
    if not found.is_dir():
        sha256 = sha256_file(found)
        if manifest_path and sha256 != _listed(manifest, manifest_path, found).get("sha256"):
            manifest = {}
    elif manifest_path:
        _check_sizes(found, manifest)
        sha256 = sha256_file(manifest_path)
    else:
        sha256 = sha256_tree(found)
    return Input(
        role,
        portable_path(path),
        sha256,
        kind=manifest.get("kind"),
        licence=manifest.get("licence"),
        source=manifest.get("source"),
    )


def _listed(manifest: Manifest, manifest_path: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(manifest_path.parent).as_posix()
    entry: dict[str, Any] = manifest.get("files", {}).get(name, {})
    return entry


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ToolError(
                f"{path}: missing or changed since {folder / MANIFEST} was written; make it again"
            )


def portable_path(path: str | os.PathLike[str]) -> str:
    """A path relative to the working directory where it lies below it, else as given."""
    if str(path) == "-":
        return "-"
    try:
        return Path(path).absolute().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)


def without_secrets(value: Any) -> Any:
    """A URL as it may be recorded: without password, and none of the values of its query readable.

    A value whose name speaks of a secret is masked, any other is a digest, so that a run with another
    ``?model=`` is still another run. What is no URL is given back as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_secrets, value))
    if not isinstance(value, str) or not re.match(r"https?://", value, re.IGNORECASE):
        return value
    head, mark, query = value.partition("?")
    scheme, _, rest = head.partition("://")
    host, slash, path = rest.partition("/")
    shown = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    return shown + mark + "&".join(map(_masked, query.split("&"))) if mark else shown


def _masked(pair: str) -> str:
    name, equals, value = pair.partition("=")
    if not equals:
        return SECRET_SHOWN if pair else ""
    digest = hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{name}={SECRET_SHOWN if SECRET_NAME.search(name) else digest}"


def manifest_of(path: Path) -> Path | None:
    """The manifest that speaks of a file or folder, or None."""
    if path.is_dir():
        beside = path / MANIFEST
        return beside if beside.is_file() else None
    sidecar = path.with_name(f"{path.name}.{MANIFEST}")
    if sidecar.is_file():
        return sidecar
    for parent in list(path.parents)[:2]:
        inside = parent / MANIFEST
        if inside.is_file():
            listed = load_manifest(inside).get("files", {})
            return inside if path.relative_to(parent).as_posix() in listed else None
    return None


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """A manifest, from its own path or its artifact's folder.

    Raises:
        ToolError: it is absent (66), or no manifest of a schema that this version reads (65).
    """
    found = Path(path)
    if found.is_dir():
        found = found / MANIFEST
    if not found.is_file():
        raise ToolError(f"{found}: no such file; is the artifact complete?", code=ExitCode.MISSING_INPUT)
    try:
        manifest = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ToolError(f"{found}: damaged manifest: {exc}") from exc
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise ToolError(f"{found}: no manifest of schema {SCHEMA}")
    return manifest


def verify(folder: Path) -> list[str]:
    """What is wrong with an artifact's files against its manifest; empty when nothing is."""
    wrong = []
    for name, entry in load_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif sha256_file(path) != entry["sha256"]:
            wrong.append(f"{path}: changed since it was written")
    return wrong


def lineage(folder: Path) -> list[tuple[int, Input, Manifest | None]]:
    """All that an artifact stands on, depth first: (depth, input, the input's manifest if still there).

    An input whose file has changed since is given without a manifest.
    """
    out: list[tuple[int, Input, Manifest | None]] = []

    def walk(manifest: Manifest, depth: int) -> None:
        for entry in manifest.get("inputs", []):
            given = Input(
                **{k: entry.get(k) for k in ("role", "path", "sha256", "kind", "licence", "source")}
            )
            found = _intact_manifest(given)
            out.append((depth, given, found))
            if found is not None:
                walk(found, depth + 1)

    walk(load_manifest(folder), 1)
    return out


def _intact_manifest(given: Input) -> Manifest | None:
    path = Path(given.path)
    if given.path == "-" or not path.exists():
        return None
    manifest_path = manifest_of(path)
    if manifest_path is None:
        return None
    current = sha256_file(manifest_path if path.is_dir() else path)
    return load_manifest(manifest_path) if current == given.sha256 else None


def write_json(path: Path, value: Any) -> None:
    """Indented JSON in UTF-8 with a newline at the end; NumPy and torch scalars as numbers.

    Raises:
        ToolError: a number in it is not finite (65); the message names where it stands.
    """
    bad = next(_not_finite(value, ""), None)
    if bad is not None:
        raise ToolError(f"{path.name}: {bad[0]} is {bad[1]}; a diverged run is no result")
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_scalar)
    path.write_text(text + "\n", encoding="utf-8")


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{place}[{i}]")
    elif hasattr(value, "item"):
        yield from _not_finite(value.item(), place)
    elif isinstance(value, float) and not math.isfinite(value):
        yield place, value


def _scalar(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def library_versions() -> dict[str, str]:
    """The installed versions of the libraries that can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
