"""Directory artifacts: written whole or not at all, with a manifest that leads back to their sources.

An artifact is what its ecosystem already reads (a Transformers or PEFT folder, GGUF, a report) plus
``artifact.json``: kind, tool and version, parameters, inputs and files by SHA-256, licences, seed,
library versions, metrics. The manifest is written last; its presence means that the artifact is complete.
Nothing in it depends on time, host, device name or process count: those go to the run log.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.files import atomic_file, leftovers, make_parent, sweep, sync
from tuneutils.shared.streams import require_readable

if TYPE_CHECKING:
    from tuneutils.shared.command import Run

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
    for path in sorted(_files(folder)):
        digest.update(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
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


def work_dir(output: str | os.PathLike[str]) -> Path:
    """Where a tool keeps checkpoints and the run log of an output: untracked, beside it."""
    path = Path(output)
    return path.parent / ".work" / path.name


@dataclass
class Artifact:
    """An output being written. As a context manager it finishes on success and vanishes on failure.

    Under a launcher of several processes only the first writes; what the others make is thrown away.

    Attributes:
        dir: the temporary folder to write into; it becomes ``final`` by one rename.
        metrics: numbers for the manifest; deterministic ones only.
        licence, source: of what the artifact holds, where it is known.
        extra: further keys of the manifest.
    """

    kind: str
    final: Path
    run: Run[Any]
    inputs: list[Input]
    dir: Path
    writes: bool = True
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str | None = None
    source: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, run: Run[Any], kind: str, inputs: Sequence[Input]) -> Artifact:
        """Check what is already there, then prepare the temporary folder.

        Raises:
            UpToDate: the output exists, whole, from the same inputs and parameters.
            ToolError: (73) it exists and differs without ``--force``, is no artifact, or is not writable.
        """
        assert run.output is not None
        final = Path(run.output)
        if final.name in ("", ".."):
            final = final.resolve()
        if not int(os.environ.get("RANK", "0")):
            _restore(final)
        if final.exists() or final.is_symlink():
            _check_existing(final, run, kind, inputs)
        if int(os.environ.get("RANK", "0")):
            return cls(kind, final, run, list(inputs), Path(tempfile.mkdtemp(prefix="tuneutils-")), False)
        make_parent(final)
        sweep(final)
        temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
        except OSError as exc:
            reason = (exc.strerror or "").lower()
            raise ToolError(f"{final}: cannot write: {reason}", code=ExitCode.CANNOT_WRITE) from exc
        return cls(kind, final, run, list(inputs), temporary)

    @property
    def work(self) -> Path:
        """The untracked folder for checkpoints and the run log."""
        return work_dir(self.final)

    def manifest(self) -> Manifest:
        """The manifest as it stands, with every file hashed."""
        files = {
            p.relative_to(self.dir).as_posix(): {"sha256": sha256_file(p), "bytes": p.stat().st_size}
            for p in sorted(_files(self.dir))
        }
        made: Manifest = {
            "schema": SCHEMA,
            "kind": self.kind,
            **_identity(self.run, self.inputs),
            "licence": self.licence,
            "source": self.source,
            "libraries": library_versions(),
            **self.extra,
            "metrics": self.metrics,
            "files": files,
        }
        return {k: v for k, v in made.items() if v is not None}

    def commit(self) -> Manifest:
        """Write the manifest, sync, and put the artifact under its final name."""
        manifest = self.manifest()
        write_json(self.dir / MANIFEST, manifest)
        for path in [*self.dir.rglob("*"), self.dir]:
            sync(path)
        previous: Path | None = None
        if self.final.exists():
            previous = self.final.parent / f".{self.final.name}.{os.getpid()}.old"
            os.rename(self.final, previous)
        try:
            os.rename(self.dir, self.final)
        except OSError:
            if previous is not None:
                os.rename(previous, self.final)
            raise
        sync(self.final.parent)
        if previous is not None:
            shutil.rmtree(previous, ignore_errors=True)
        return manifest

    def __enter__(self) -> Artifact:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.writes:
                self.commit()
        finally:
            shutil.rmtree(self.dir, ignore_errors=True)


def _identity(run: Run[Any], inputs: Sequence[Input]) -> dict[str, Any]:
    from tuneutils.shared.options import version

    return {
        "tool": run.tool,
        "version": version(),
        "seed": run.seed,
        "params": run.manifest_params(),
        "inputs": [i.as_json() for i in inputs],
    }


def _check_existing(final: Path, run: Run[Any], kind: str, inputs: Sequence[Input]) -> None:
    if not final.is_dir():
        raise ToolError(f"{final}: exists and is no directory", code=ExitCode.CANNOT_WRITE)
    if not (final / MANIFEST).is_file():
        if not any(final.iterdir()):
            return
        raise ToolError(
            f"{final}: exists and is no artifact; choose another -o or remove it yourself",
            code=ExitCode.CANNOT_WRITE,
        )
    if run.force:
        return
    manifest = load_manifest(final)
    difference = _difference(manifest, _identity(run, inputs), kind) or next(iter(verify(final)), None)
    if difference is None:
        raise UpToDate(manifest)
    raise ToolError(
        f"{final}: exists and differs ({difference}); --force replaces it", code=ExitCode.CANNOT_WRITE
    )


def _restore(final: Path) -> None:
    """Finish what a run that was killed while replacing an artifact left: the old one is still whole."""
    for old in leftovers(final, "old"):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)


def _difference(old: Manifest, new: Mapping[str, Any], kind: str) -> str | None:
    """The first thing in which an existing artifact differs from the one asked for."""
    for key, wanted in (
        ("kind", kind),
        ("tool", new["tool"]),
        ("version", new["version"]),
        ("seed", new["seed"]),
    ):
        if old.get(key) != wanted:
            return f"{key} {old.get(key)!r}, now {wanted!r}"
    for name, entry in new["params"].items():
        before = old.get("params", {}).get(name, {}).get("value")
        if before != json.loads(json.dumps(entry["value"])):
            return f"{name} {before!r}, now {entry['value']!r}"
    before_inputs = [(i["role"], i["sha256"]) for i in old.get("inputs", [])]
    if before_inputs != [(i["role"], i["sha256"]) for i in new["inputs"]]:
        return "other inputs"
    if any(i["path"] == "-" for i in new["inputs"]):
        return "stdin cannot be compared"
    return None


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


def sidecar(run: Run[Any], stream: Path, inputs: Sequence[Input], **keys: Any) -> None:
    """Write ``FILE.artifact.json`` beside a record stream that a tool has written."""
    manifest: Manifest = {
        "schema": SCHEMA,
        "kind": "records",
        **_identity(run, inputs),
        **{k: v for k, v in keys.items() if v is not None},
        "files": {stream.name: {"sha256": sha256_file(stream), "bytes": stream.stat().st_size}},
    }
    with atomic_file(stream.with_name(f"{stream.name}.{MANIFEST}")) as temporary:
        write_json(temporary, manifest)
