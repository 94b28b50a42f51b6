"""Write params.yaml for a profile: ``python pipeline/profile.py smoke``.

A profile is a file in profiles/ with what differs from profiles/default.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent


def overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it; a changed key must exist, and null removes it."""
    made = dict(base)
    for key, value in changes.items():
        if key not in base:
            raise SystemExit(f"profile: unknown key {key!r}; profiles/default.yaml has {', '.join(base)}")
        if value is None:
            del made[key]
        else:
            made[key] = overlay(base[key], value) if isinstance(value, dict) else value
    return made


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
