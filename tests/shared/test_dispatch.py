"""``tuneutils``: one list of all tools, none imported before it is named."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support import Result, run_cli

TOOL = """
import click, sys
@click.command("their-tool", help="Do it.")
@click.option("--size", default=3, show_default=True, help="How large.")
@click.argument("files", nargs=-1)
def main(size, files):
    click.echo(f"{size} {files}")
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """An installed distribution of a third party with three tools, one of which cannot be imported."""
    theirs = tmp_path / "their_package"
    for folder, docstring in (
        ("their_tool", "compress: fold a model twice."),
        ("odd_tool", "Just a tool."),
        ("broken", "data: fail."),
    ):
        (theirs / folder).mkdir(parents=True)
        (theirs / folder / "__init__.py").write_text(f'"""{docstring}"""\n')
        (theirs / folder / "cli.py").write_text(TOOL)
    (theirs / "broken" / "cli.py").write_text("import no_such_module\n")
    (theirs / "__init__.py").write_text("")
    (tmp_path / "single.py").write_text(f'"""evaluate: stand alone."""{TOOL}')
    (tmp_path / "plain.py").write_text('"""evaluate: be no Click command."""\nmain = print\n')
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tuneutils.tools]\ntheir-tool = their_package.their_tool.cli:main\n"
        "odd-tool = their_package.odd_tool.cli:main\nbroken = their_package.broken.cli:main\n"
        "single = single:main\nplain = plain:main\n"
    )
    return tmp_path


def tuneutils(plugins: Path, *args: str, **env: str) -> Result:
    return run_cli("-m", "tuneutils.shared.dispatch", *args, env={"PYTHONPATH": str(plugins), **env})


def test_help_lists_by_group_without_importing(plugins: Path) -> None:
    (plugins / "their_package" / "their_tool" / "cli.py").write_text("raise SystemExit('imported')")
    done = tuneutils(plugins, "--help")
    lines = done.stdout.splitlines()
    assert done.code == 0
    assert lines.index("Data:") < lines.index("Compress:") < lines.index("Evaluate:") < lines.index("Other:")
    assert [w.split() for w in lines if "fold a model" in w] == [
        ["their-tool", "fold", "a", "model", "twice"]
    ]
    assert any(line.split()[:3] == ["single", "stand", "alone"] for line in lines)
    assert any(line.split()[:2] == ["odd-tool", "Just"] for line in lines)
    assert tuneutils(plugins).stdout == done.stdout
    assert tuneutils(plugins, "-h").stdout == done.stdout


def test_a_tool_is_the_same_under_either_name(plugins: Path) -> None:
    done = tuneutils(plugins, "their-tool", "--help")
    assert done.stdout.startswith("Usage: their-tool [OPTIONS] [FILES]...")
    assert tuneutils(plugins, "their_tool", "--size", "4", "x").stdout == "4 ('x',)\n"
    error = tuneutils(plugins, "their-tool", "--siz", "4")
    assert (error.code, error.stderr.startswith("their-tool: error: ")) == (2, True)
    assert tuneutils(plugins, "single", "a").stdout == "3 ('a',)\n"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["thier-tool"], 2, "no such tool 'thier-tool' (did you mean 'their-tool'?)"),
        (["xyz"], 2, "no such tool 'xyz'; see: tuneutils --help"),
        (["man", "thier-tool"], 2, "did you mean 'their-tool'?"),
        (["man"], 2, "missing argument 'TOOL'"),
        (["completion", "tcsh"], 2, "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (["completion", "bash", "nosuch"], 2, "no such tool 'nosuch'"),
        (["--versoin"], 2, "'--version'"),
        (["broken"], 69, "the package 'no_such_module' is not installed"),
        (["plain"], 70, "plain:main: is no Click command"),
    ],
)
def test_errors(plugins: Path, args: list[str], code: int, says: str) -> None:
    done = tuneutils(plugins, *args)
    assert (done.code, says in done.error) == (code, True), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(plugins: Path, shell: str) -> None:
    script = tuneutils(plugins, "completion", shell, "their-tool").stdout
    assert "_THEIR_TOOL_COMPLETE" in script
    assert "_TUNEUTILS_COMPLETE" in tuneutils(plugins, "completion", shell).stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_completion_of_tools_and_of_their_options(plugins: Path) -> None:
    asked = {"_TUNEUTILS_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    assert "plain,their-tool" in tuneutils(plugins, COMP_WORDS="tuneutils the", **asked).stdout
    asked["COMP_CWORD"] = "2"
    assert "plain,--size" in tuneutils(plugins, COMP_WORDS="tuneutils their-tool --s", **asked).stdout


def test_manual_page(plugins: Path) -> None:
    page = tuneutils(plugins, "man", "their-tool").stdout
    assert page.startswith('.TH "THEIR-TOOL" "1"')
    assert r"their\-tool \- fold a model twice" in page
    assert r"\fB\-\-size INTEGER\fR" in page
    if shutil.which("man"):
        shown = subprocess.run(["man", "-l", "-"], input=page, capture_output=True, text=True, check=True)
        assert "fold a model twice" in shown.stdout
        assert shown.stderr == ""


def test_version(plugins: Path) -> None:
    assert tuneutils(plugins, "--version").stdout.startswith("tuneutils (tuneutils) ")


def test_listing_loads_nothing_heavy(plugins: Path) -> None:
    code = (
        "import sys; from tuneutils.shared.dispatch import main"
        "\ntry: main(['--help'])"
        "\nexcept SystemExit: pass"
        "\nprint(sorted({'torch', 'numpy', 'yaml', 'their_package.their_tool', 'single'} & set(sys.modules)))"
    )
    assert run_cli("-c", code, env={"PYTHONPATH": str(plugins)}).stdout.splitlines()[-1] == "[]"
