"""The code that each stage of dvc.yaml really runs, as its deps: ``python pipeline/deps.py [--write]``.

A stage depends on its tools' folders and on every shared module that they import, directly or not.
Without ``--write`` the differences are printed, and the exit code is 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import grimp
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
SHARED = "tuneutils.shared"


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("tuneutils.shared", "tuneutils.tools", exclude_type_checking_imports=True)


@cache
def code_of(tool: str) -> tuple[str, ...]:
    """The paths of a tool's folder and of the shared modules behind it."""
    package = f"tuneutils.tools.{tool.replace('-', '_')}"
    modules = {package} | graph().find_descendants(package)
    reached = set().union(*(graph().find_upstream_modules(m) for m in modules))
    shared = sorted(m for m in reached if m.startswith(SHARED + "."))
    return (f"tools/{tool.replace('-', '_')}", *sorted({_path(m) for m in shared}))


def _path(module: str) -> str:
    relative = module.removeprefix("tuneutils.").replace(".", "/")
    return relative if (ROOT / relative).is_dir() else f"{relative}.py"


def tools() -> list[str]:
    return [p.parent.name.replace("_", "-") for p in sorted(ROOT.glob("tools/*/cli.py"))]


def wanted(stage: dict[str, Any]) -> list[str]:
    """A stage's deps: the data that it names itself, then its code."""
    command = " ".join(stage["cmd"]) if isinstance(stage["cmd"], list) else stage["cmd"]
    used = [t for t in tools() if re.search(rf"(^|[\s;|&]){t}(\s|$)", command)]
    data = [d for d in stage.get("deps", []) if not str(d).startswith(("tools/", "shared/"))]
    code = sorted({path for tool in used for path in code_of(tool)})
    folders = [p for p in code if not p.endswith(".py")]
    return data + [p for p in code if not any(p != f and p.startswith(f + "/") for f in folders)]


def main(write: bool) -> int:
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    path = ROOT / "dvc.yaml"
    document = yaml.load(path.read_text(encoding="utf-8"))
    wrong = 0
    for name, outer in document["stages"].items():
        stage = outer.get("do", outer)
        before, after = list(stage.get("deps", [])), wanted(stage)
        if before != after:
            wrong += 1
            print(f"{name}: {', '.join(sorted(set(before) ^ set(after))) or 'order'}")
            stage["deps"] = after
    if write and wrong:
        with open(path, "w", encoding="utf-8") as stream:
            yaml.dump(document, stream)
        return 0
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
