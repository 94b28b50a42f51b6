"""What is known of an artifact and of everything that it stands on, each fact with where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import (
    Input,
    Manifest,
    lineage,
    load_manifest,
    manifest_of,
    portable_path,
    sha256_file,
    sha256_tree,
)
from tuneutils.shared.errors import ExitCode, ToolError

UNKNOWN = "unknown"
REMOTE = re.compile(r"^(pypi|npm|deb|hf|builtin):")
HUB = re.compile(r"^hf:(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+?))?(?:!/.*)?$")
DATA_KINDS = ("records",)
DATA_ROLES = ("records", "heldout", "data", "replay", "check-records", "examples")


@dataclass
class Node:
    """An input somewhere below the artifact.

    Attributes:
        state: ``unchanged``, ``changed``, ``gone``, ``remote`` (a source outside) or ``stdin``.
        manifest: the input's own, as it is now; empty without one.
        made: the kind of what was made from it.
    """

    given: Input
    state: str
    manifest: Manifest
    made: str = UNKNOWN
    children: list[Node] = field(default_factory=list)

    @property
    def licence(self) -> str:
        return known(self.given.licence or self.manifest.get("licence"))

    @property
    def source(self) -> str:
        return known(self.given.source or self.manifest.get("source"))

    @property
    def is_model(self) -> bool:
        return self.given.kind == "model" or self.given.role == "model"

    @property
    def is_data(self) -> bool:
        used = self.given.role in DATA_ROLES or (self.given.role == "source" and self.made in DATA_KINDS)
        return not self.is_model and (used or self.given.kind in DATA_KINDS)


@dataclass
class Facts:
    """An artifact, its manifest, its files' state, and its lineage."""

    path: str
    root: Path
    manifest: Manifest
    sha256: str
    damaged: list[str]
    inputs: list[Node]
    reports: list[tuple[str, Manifest, dict[str, Any]]]

    @property
    def name(self) -> str:
        return Path(self.path).resolve().name

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind", UNKNOWN))

    @property
    def bytes(self) -> int:
        return sum(entry.get("bytes", 0) for entry in self.manifest.get("files", {}).values())

    def nodes(self) -> Iterator[tuple[int, Node]]:
        """The lineage, depth first, with depths from 1."""

        def walk(nodes: list[Node], depth: int) -> Iterator[tuple[int, Node]]:
            for node in nodes:
                yield depth, node
                yield from walk(node.children, depth + 1)

        return walk(self.inputs, 1)

    def base(self) -> Node | None:
        """The model that this one was made from."""
        return next((n for n in self.inputs if n.is_model), None)

    def broken(self) -> list[Node]:
        return [n for _, n in self.nodes() if n.state in ("changed", "gone")]

    def licences(self) -> list[tuple[str, str]]:
        """(what, licence) of the artifact and everything below it, each once."""
        own = [(self.path, known(self.manifest.get("licence")))]
        return list(dict.fromkeys(own + [(n.given.path, n.licence) for _, n in self.nodes()]))

    def training_log(self) -> list[dict[str, Any]]:
        """The lines of ``log.jsonl``, or the manifest's ``training_log``."""
        path = self.root / "log.jsonl"
        if "log.jsonl" in self.manifest.get("files", {}) and path.is_file():
            return [
                json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        found = self.manifest.get("training_log")
        return [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []


def known(value: Any) -> str:
    """The value as text, or ``unknown``."""
    return str(value) if value not in (None, "") else UNKNOWN


def gather(given: str, reports: tuple[str, ...]) -> Facts:
    """Read an artifact's manifest chain and compare it with what is on disk.

    Raises:
        ToolError: (66) no such artifact; (65) no manifest, or a report that measured something else.
    """
    path = Path(given)
    if not path.exists():
        raise ToolError(f"{given}: no such file or directory", code=ExitCode.MISSING_INPUT)
    manifest_path = manifest_of(path)
    if manifest_path is None:
        raise ToolError(f"{given}: no artifact.json speaks of it, so nothing true can be said; see its maker")
    manifest = load_manifest(manifest_path)
    sha256 = sha256_file(manifest_path if path.is_dir() else path)
    root = path if path.is_dir() else manifest_path.parent
    kind = known(manifest.get("kind"))
    nodes = [_node(entry, kind, frozenset()) for entry in manifest.get("inputs", [])]
    found = [_report(report, sha256, given) for report in reports]
    return Facts(portable_path(given), root, manifest, sha256, _damaged(root, manifest), nodes, found)


def _node(entry: Mapping[str, Any], made: str, above: frozenset[str]) -> Node:
    names = ("role", "path", "sha256", "kind", "licence", "source")
    given = Input(**{k: entry.get(k) for k in names})  # type: ignore[arg-type]
    state, manifest = _look(given)
    node = Node(given, state, manifest, made)
    if state == "unchanged" and given.sha256 not in above:
        kind, above = known(manifest.get("kind")), above | {given.sha256}
        node.children = [_node(e, kind, above) for e in manifest.get("inputs", [])]
    return node


def _look(given: Input) -> tuple[str, Manifest]:
    path = Path(given.path)
    if given.path == "-":
        return "stdin", {}
    if REMOTE.match(given.path) or (HUB.match(given.source or "") and not path.exists()):
        return "remote", {}
    if not path.exists():
        return "gone", {}
    manifest_path = manifest_of(path)
    manifest = load_manifest(manifest_path) if manifest_path else {}
    if _digest(path, manifest_path) != given.sha256:
        return "changed", {}
    if path.is_dir() and manifest and _damaged(path, manifest):
        return "changed", manifest
    return "unchanged", manifest


def _digest(path: Path, manifest_path: Path | None) -> str:
    """As a manifest records an input: of a file, of an artifact's manifest, or of a folder's listing."""
    if not path.is_dir():
        return sha256_file(path)
    return sha256_file(manifest_path) if manifest_path else sha256_tree(path)


def _damaged(root: Path, manifest: Manifest) -> list[str]:
    """Files of an artifact that are not as its manifest has them."""
    wrong = []
    for name, entry in manifest.get("files", {}).items():
        path = root / name
        if not path.is_file():
            wrong.append(f"{name}: missing")
        elif sha256_file(path) != entry["sha256"]:
            wrong.append(f"{name}: changed since it was written")
    return wrong


def _report(given: str, sha256: str, artifact: str) -> tuple[str, Manifest, dict[str, Any]]:
    manifest = load_manifest(given)
    path = Path(given, "report.json")
    if manifest.get("kind") != "report" or not path.is_file():
        raise ToolError(f"{given}: no report of lm-bench")
    # A joined report stands on reports, and those on the models that they measured.
    if all(below.sha256 != sha256 for _, below, _ in lineage(Path(given))):
        raise ToolError(
            f"{given}: did not measure {artifact}, or it has changed since; measure it again with lm-bench"
        )
    if wrong := _damaged(Path(given), manifest):
        raise ToolError(f"{given}: {wrong[0]}; measure again with lm-bench")
    return portable_path(given), manifest, json.loads(path.read_text(encoding="utf-8"))
