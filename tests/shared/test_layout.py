"""The layout that makes tools alike: names agree, imports stay light, layers hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, environment, run_cli

from tuneutils.shared.dispatch import GROUPS

TOOLS = sorted(p.name for p in (ROOT / "tools").iterdir() if (p / "__init__.py").is_file())
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "numpy",
    "accelerate",
    "bitsandbytes",
    "pandas",
    "pyarrow",
)
LIGHT_SHARED = (
    "errors",
    "exits",
    "options",
    "command",
    "records",
    "artifact",
    "sources",
    "device",
    "dispatch",
)


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_below(folder: str) -> set[str]:
    """The dotted names of a folder's packages, as ``tuneutils.…``."""
    found = {p.parent.relative_to(ROOT) for p in (ROOT / folder).rglob("__init__.py")}
    return {"tuneutils." + ".".join(p.parts) for p in found if "__pycache__" not in p.parts}


def test_folders_packages_scripts_and_entry_points_agree(pyproject: dict[str, Any]) -> None:
    commands = {t.replace("_", "-"): f"tuneutils.tools.{t}.cli:main" for t in TOOLS}
    project = pyproject["project"]
    assert project["entry-points"]["tuneutils.tools"] == commands
    scripts = {"tuneutils": "tuneutils.shared.dispatch:main", **commands}
    assert project["scripts"] == scripts
    packages = pyproject["tool"]["setuptools"]["packages"]
    assert set(packages) == packages_below("tools") | packages_below("shared")
    assert len(packages) == len(set(packages))


@pytest.mark.parametrize("tool", TOOLS)
def test_package_is_one_docstring_with_a_known_group(tool: str) -> None:
    tree = ast.parse((ROOT / "tools" / tool / "__init__.py").read_text())
    assert len(tree.body) == 1
    docstring = ast.get_docstring(tree)
    assert docstring is not None
    group, _, purpose = docstring.partition(": ")
    assert group in GROUPS
    assert purpose.endswith(".")
    assert "\n" not in purpose
    assert purpose[0].islower()


@pytest.mark.parametrize("tool", TOOLS)
def test_folder_holds_a_command_and_a_page(tool: str) -> None:
    assert (ROOT / "tools" / tool / "cli.py").is_file()
    page = (ROOT / "tools" / tool / "README.md").read_text()
    assert "<!-- options -->" in page
    assert page.count("\n```") >= 2, "two examples with their output"


def test_commands_and_their_layer_import_nothing_heavy() -> None:
    """One process imports all of them in turn and names the first that loads a heavy library."""
    modules = [f"tuneutils.shared.{m}" for m in LIGHT_SHARED]
    modules += [f"tuneutils.tools.{t}.cli" for t in TOOLS if (ROOT / "tools" / t / "cli.py").is_file()]
    code = (
        "import importlib, sys"
        f"\nfor name in {modules!r}:"
        "\n    importlib.import_module(name)"
        f"\n    loaded = sorted(set({HEAVY!r}) & set(sys.modules))"
        "\n    if loaded: sys.exit(f'{name} imports {loaded}')"
    )
    done = run_cli("-c", code)
    assert done.code == 0, done.stderr


def test_command_names_agree_with_folders() -> None:
    code = (
        "import importlib"
        f"\nfor t in {[t for t in TOOLS if (ROOT / 'tools' / t / 'cli.py').is_file()]!r}:"
        "\n    c = importlib.import_module(f'tuneutils.tools.{t}.cli').main"
        "\n    d = importlib.import_module(f'tuneutils.tools.{t}').__doc__"
        "\n    assert (c.tool_name, c.group) == (t.replace('_', '-'), d.split(':')[0]), t"
    )
    done = run_cli("-c", code)
    assert done.code == 0, done.stderr


def test_import_contracts() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_a_monolith() -> None:
    """A file that needs more than 500 lines does more than one thing."""
    long = {
        str(p.relative_to(ROOT)): n
        for folder in ("tools", "shared")
        for p in (ROOT / folder).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 500
    }
    assert long == {}
