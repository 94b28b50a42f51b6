"""A JSON Schema of ``params.yaml``, from the tools' own options and the commands of ``dvc.yaml``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

#: In a path through params.yaml: every entry of the mapping, as ``foreach`` takes them.
EACH = "*"


def schema(commands: Mapping[str, click.Command], root: Path) -> dict[str, Any]:
    """One definition a command, and the sections of ``params.yaml`` bound to them.

    A section is bound by its use: ``lora-tune ${tune} ${item}`` below ``foreach: ${methods}`` makes ``tune``
    and each entry of ``methods`` sections of ``lora-tune``. What no command uses is refused.
    """
    leaves = dict(leaf for name in sorted(commands) for leaf in _leaves(name, commands[name]))
    made: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Parameters of the pipeline",
    }
    if (root / "dvc.yaml").is_file():
        made.update(_bound(leaves, _yaml(root / "dvc.yaml"), _yaml(root / "params.yaml")))
    made["$defs"] = {name: _definition(command) for name, command in leaves.items()}
    return made


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


def _bound(leaves: Mapping[str, click.Command], pipeline: Mapping[str, Any], params: Any) -> dict[str, Any]:
    top = _section()
    for tool, path in _uses(leaves, pipeline):
        _bind(top, path, {"$ref": f"#/$defs/{tool}"} if isinstance(_at(params, path), dict) else {})
    return top


def _bind(node: dict[str, Any], path: list[str], value: dict[str, Any]) -> None:
    """Put ``value`` at ``path``, unless a section above it is a tool's as a whole."""
    for i, step in enumerate(path):
        if "properties" not in node:
            return
        last = i == len(path) - 1
        inside, key = (node, "additionalProperties") if step == EACH else (node["properties"], step)
        if last and value:
            inside[key] = value
        elif not inside.get(key):
            inside[key] = {} if last else _section()
        node = inside[key]


def _section() -> dict[str, Any]:
    return {"type": "object", "properties": {}, "additionalProperties": False}


def _uses(
    leaves: Mapping[str, click.Command], pipeline: Mapping[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """Every ``${…}`` of a stage's commands with the tool whose options it becomes; a matrix's with none."""
    for stage in pipeline.get("stages", {}).values():
        for axis in re.findall(r"\$\{([\w.-]+)\}", str(stage.get("matrix", ""))):
            yield "", axis.split(".")
        each = re.fullmatch(r"\$\{([\w.-]+)\}", str(stage.get("foreach", "")))
        given = stage.get("do", stage).get("cmd", "")
        for command in given if isinstance(given, list) else [given]:
            yield from _references(leaves, command, each and each[1])


def _references(
    leaves: Mapping[str, click.Command], command: str, each: str | None
) -> Iterator[tuple[str, list[str]]]:
    """Those of one command; ``each`` is the mapping that ``foreach`` takes."""
    words = command.split()
    pairs = [" ".join(words[i : i + 2]) for i in range(len(words))]
    tool = next((name for name in (*pairs, *words) if name in leaves), None)
    for reference in re.findall(r"\$\{([\w.-]+)\}", command):
        path = reference.split(".")
        if path[0] == "item" and each:
            path = [*each.split("."), EACH, *path[1:]]
        if tool is not None and path[0] not in ("item", "key"):
            yield tool, path


def _at(params: Any, path: list[str]) -> Any:
    for step in path:
        if not isinstance(params, dict) or not params:
            return None
        params = next(iter(params.values())) if step == EACH else params.get(step)
    return params


def _leaves(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for below in sorted(command.commands):
        yield from _leaves(f"{name} {below}", command.commands[below])


def _definition(command: click.Command) -> dict[str, Any]:
    options = [
        p for p in command.params if isinstance(p, click.Option) and p.name not in ("params", "version")
    ]
    return {
        "type": "object",
        "properties": {str(p.name): _property(p) for p in options},
        "additionalProperties": False,
    }


def _property(option: click.Option) -> dict[str, Any]:
    one = _value(option.type)
    made: dict[str, Any] = {"anyOf": [one, {"type": "array", "items": one}]} if option.multiple else one
    if option.help:
        made["description"] = option.help
    default = option.to_info_dict()["default"]
    if isinstance(default, (bool, int, float, str)):
        made["default"] = default
    return made


def _value(kind: click.ParamType[Any]) -> dict[str, Any]:
    if isinstance(kind, click.Choice):
        return {"enum": list(kind.choices)}
    if isinstance(kind, click.types.BoolParamType):
        return {"type": "boolean"}
    names = {"integer": "integer", "integer range": "integer", "float": "number", "float range": "number"}
    made: dict[str, Any] = {"type": names.get(kind.name, "string")}
    if made["type"] == "string":
        made["type"] = ["string", "number"]  # a title may be all digits
    for key, bound in (("minimum", "min"), ("maximum", "max")):
        if getattr(kind, bound, None) is not None:
            made[key] = getattr(kind, bound)
    return made
