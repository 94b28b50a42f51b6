"""Artifacts: written whole or not at all, with a manifest that leads back to their sources.

A directory artifact is what its ecosystem already reads (a Transformers or PEFT folder, GGUF, a report)
plus ``artifact.json``, written last; its presence means that the artifact is complete. A record stream
has its manifest beside it, in ``FILE.artifact.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.files import atomic_file, leftovers, make_parent, sweep, sync
from tuneutils.shared.manifest import (
    LIBRARIES,
    MANIFEST,
    SCHEMA,
    Input,
    Manifest,
    describe_input,
    files_of,
    library_versions,
    lineage,
    load_manifest,
    manifest_of,
    portable_path,
    sha256_file,
    sha256_tree,
    verify,
    write_json,
)
from tuneutils.shared.processes import is_main

if TYPE_CHECKING:
    from tuneutils.shared.command import Run

__all__ = [
    "LIBRARIES",
    "MANIFEST",
    "SCHEMA",
    "Artifact",
    "Input",
    "Manifest",
    "check_stream",
    "describe_input",
    "library_versions",
    "lineage",
    "load_manifest",
    "log_event",
    "manifest_of",
    "portable_path",
    "sha256_file",
    "sha256_tree",
    "sidecar",
    "verify",
    "work_dir",
    "write_json",
]


def work_dir(output: str | os.PathLike[str]) -> Path:
    """Where a tool keeps checkpoints and the run log of an output: untracked, beside it."""
    path = Path(output)
    return path.parent / ".work" / path.name


def log_event(run: Run[Any], **event: Any) -> None:
    """A line of the run log of a run's output: what depends on clock and machine goes there."""
    if not is_main():
        return
    work = work_dir(str(run.output))
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "run.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps({"time": time.time(), "tool": run.tool, **event}, default=str) + "\n")


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
        if is_main():
            _restore(final)
        if final.exists() or final.is_symlink():
            _check_existing(final, run, kind, inputs)
        if not is_main():
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
            for p in sorted(files_of(self.dir))
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
            _open_to_readers(path)
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


def _open_to_readers(path: Path) -> None:
    """The permissions that the user's umask gives to new files; some libraries write for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


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


def check_stream(run: Run[Any], inputs: Sequence[Input]) -> None:
    """The rule of directory artifacts for a stream: the same again is left, another needs ``--force``.

    Call it before the work; nothing is checked for stdout, a device or a pipe.

    Raises:
        UpToDate: the stream is there, unchanged, from the same inputs and parameters.
        ToolError: (73) it exists and differs, or nothing says what it was made from, without ``--force``.
    """
    path = Path(str(run.output))
    if run.output in (None, "-") or run.force or not path.is_file():
        return
    beside = path.with_name(f"{path.name}.{MANIFEST}")
    if not beside.is_file():
        difference: str | None = f"no {beside.name} beside it"
    else:
        manifest = load_manifest(beside)
        difference = _difference(manifest, _identity(run, inputs), "records")
        if difference is None and manifest["files"][path.name]["sha256"] == sha256_file(path):
            raise UpToDate(manifest)
        difference = difference or "changed since it was written"
    raise ToolError(
        f"{path}: exists and differs ({difference}); --force replaces it", code=ExitCode.CANNOT_WRITE
    )


def sidecar(run: Run[Any], stream: Path, inputs: Sequence[Input], **keys: Any) -> None:
    """Write ``FILE.artifact.json`` beside a record stream that a tool has written.

    Nothing is written for stdout, a device or a pipe.
    """
    if str(stream) == "-" or not stream.is_file():
        return
    manifest: Manifest = {
        "schema": SCHEMA,
        "kind": "records",
        **_identity(run, inputs),
        **{k: v for k, v in keys.items() if v is not None},
        "files": {stream.name: {"sha256": sha256_file(stream), "bytes": stream.stat().st_size}},
    }
    with atomic_file(stream.with_name(f"{stream.name}.{MANIFEST}")) as temporary:
        write_json(temporary, manifest)
