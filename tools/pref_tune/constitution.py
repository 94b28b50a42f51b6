"""A constitution: principles in a YAML file, each with the request of a critique and of a revision."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Input, describe_input, sha256_file
from tuneutils.shared.errors import ExitCode, ToolError, nearest

BUILTIN = "builtin:"
KEYS = ("name", "licence", "principles")


@dataclass(frozen=True)
class Principle:
    """One principle; ``{principle}`` in a request stands for its sentence."""

    id: str
    principle: str
    critique_request: str
    revision_request: str

    def critique(self) -> str:
        return self.critique_request.replace("{principle}", self.principle)

    def revision(self) -> str:
        return self.revision_request.replace("{principle}", self.principle)


def path_of(given: str) -> Path:
    """The file of a constitution that is named by path or as ``builtin:NAME``.

    Raises:
        ToolError: 66: there is none.
    """
    if not given.startswith(BUILTIN):
        path = Path(given)
        if not path.is_file():
            raise ToolError(f"{given}: no such file", code=ExitCode.MISSING_INPUT)
        return path
    folder = Path(str(files("tuneutils.tools.pref_tune") / "constitutions"))
    known = {p.stem: p for p in folder.glob("*.yaml")}
    name = given.removeprefix(BUILTIN)
    if name not in known:
        raise ToolError(
            f"{given}: unknown; there is {', '.join(BUILTIN + n for n in sorted(known))}",
            code=ExitCode.MISSING_INPUT,
        )
    return known[name]


def as_input(given: str) -> Input:
    """The constitution as an input of a manifest."""
    path = path_of(given)
    if given.startswith(BUILTIN):
        return Input("constitution", given, sha256_file(path), kind="file", licence="Apache-2.0")
    return describe_input("constitution", given)


def load(given: str) -> list[Principle]:
    """The principles of a constitution.

    Raises:
        ToolError: exit 65, naming the principle and the key that is wrong.
    """
    import yaml

    try:
        loaded = yaml.safe_load(path_of(given).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ToolError(f"{given}: not YAML: {' '.join(str(exc).split())[:200]}") from exc
    if not isinstance(loaded, dict) or not isinstance(loaded.get("principles"), list):
        raise ToolError(f"{given}: must have a list of principles")
    _known(given, loaded, KEYS)
    made = [_principle(f"{given}: principle {i}", one) for i, one in enumerate(loaded["principles"], 1)]
    if not made:
        raise ToolError(f"{given}: has no principles")
    ids = [p.id for p in made]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise ToolError(f"{given}: two principles have the id {twice!r}")
    return made


def _principle(place: str, one: Any) -> Principle:
    if not isinstance(one, dict):
        raise ToolError(f"{place}: must have {', '.join(f.name for f in fields(Principle))}")
    names = [f.name for f in fields(Principle)]
    _known(place, one, names)
    for name in names:
        value = one.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ToolError(f"{place}: {name} must be a text, is {value!r}")
    return Principle(**{name: " ".join(one[name].split()) for name in names})


def _known(place: str, found: dict[Any, Any], names: Any) -> None:
    for key in found:
        if key not in names:
            raise ToolError(f"{place}: unknown key {key!r}{nearest(str(key), names)}")
