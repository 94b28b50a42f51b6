"""Write params.yaml for a profile: ``python pipeline/profile.py smoke``.

A profile is a file in profiles/ with what differs from profiles/default.yaml.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


@cache
def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "params.schema.json").read_text(encoding="utf-8"))
    return loaded


def overlay(
    base: dict[str, Any], changes: dict[str, Any], section: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it; each key must be known, and null removes it.

    Known is what ``base`` has, and the options of the tool whose section it is, by params.schema.json.
    """
    section = _resolved(schema() if section is None else section)
    made = dict(base)
    for key, value in changes.items():
        inside = section.get("properties", {}).get(key, section.get("additionalProperties") or {})
        if key not in base and key not in section.get("properties", {}):
            raise SystemExit(f"profile: unknown key {key!r}; profiles/default.yaml has {', '.join(base)}")
        if value is None:
            made.pop(key, None)
        else:
            made[key] = overlay(base.get(key, {}), value, inside) if isinstance(value, dict) else value
    return made


def _resolved(section: dict[str, Any]) -> dict[str, Any]:
    name = section.get("$ref", "").removeprefix("#/$defs/")
    found: dict[str, Any] = schema()["$defs"][name] if name else section
    return found


def main(name: str) -> None:
    path = ROOT / "profiles" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise SystemExit(f"profile: no profile {name!r}; there are {known}")
    text = (ROOT / "profiles" / "default.yaml").read_text(encoding="utf-8")
    if name != "default":
        made = overlay(yaml.safe_load(text), yaml.safe_load(path.read_text(encoding="utf-8")))
        text = yaml.safe_dump(made, sort_keys=False)
    target = ROOT / "params.yaml"
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["default"])
