"""``tuneutils TOOL …``: every registered tool under one name, none imported before it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.exits import completion_variable, guarded, run_command
from tuneutils.shared.options import context_settings, version_option

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "tuneutils.tools"
GROUPS = ("import", "data", "train", "compress", "evaluate")


@dataclass(frozen=True)
class Tool:
    """A registered tool, as far as its package's docstring ``<group>: <purpose>.`` tells.

    Attributes:
        entry: where its Click command is.
        group: the heading that it is listed under; ``other`` for one without such a docstring.
        purpose: one line without its full stop.
    """

    entry: EntryPoint
    group: str
    purpose: str


def registered() -> dict[str, EntryPoint]:
    """The entry points of all tools, ours and third parties', by name."""
    from importlib.metadata import entry_points

    return {e.name: e for e in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name)}


def describe(entry: EntryPoint) -> Tool:
    """Read a tool's group and purpose out of its source, without importing it."""
    docstring = _docstring(entry.module)
    group, colon, purpose = docstring.partition(": ")
    if not colon or " " in group:
        group, purpose = "other", docstring
    return Tool(entry, group, purpose.strip().rstrip("."))


def _docstring(module: str) -> str:
    """The first line of the docstring of the package that holds ``module``."""
    import ast

    for name in (module.rpartition(".")[0], module):
        path = _source(name) if name else None
        if path is not None:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
            return (text or "").partition("\n")[0]
    return ""


def _source(module: str) -> Path | None:
    """The file of a module; only our own parent packages, or a top-level one's finder, are asked."""
    from importlib.util import find_spec

    ours = f"{ENTRY_POINTS}."
    top, _, rest = (
        (ENTRY_POINTS, ".", module.removeprefix(ours)) if module.startswith(ours) else module.partition(".")
    )
    spec = find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for location in spec.submodule_search_locations or ():
        path = Path(location, *rest.split("."))
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None


def load(name: str) -> click.Command:
    """Import a tool's command.

    Raises:
        ToolError: no tool of that name (2), or what is registered is no Click command (70).
    """
    tools = registered()
    known = name.replace("_", "-")
    if known not in tools:
        message = f"no such tool {name!r}{nearest(known, tools)}; see: tuneutils --help"
        raise ToolError(message, code=ExitCode.USAGE)
    command = tools[known].load()
    if not isinstance(command, click.Command):
        raise ToolError(f"{tools[known].value}: is no Click command", code=ExitCode.BUG)
    return command


class Dispatcher(click.Group):
    """Lists all tools by group, and loads the one that is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*registered(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or load(cmd_name)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        tools = {name: describe(entry) for name, entry in registered().items()}
        found = {t.group for t in tools.values()}
        width = max(map(len, [*tools, *self.commands]))
        for group in [*(g for g in GROUPS if g in found), *sorted(found - set(GROUPS))]:
            with formatter.section(group.capitalize()):
                formatter.write_dl(
                    [(n.ljust(width), t.purpose) for n, t in tools.items() if t.group == group]
                )
        with formatter.section("About the tools"):
            formatter.write_dl([(n.ljust(width), c.get_short_help_str(80)) for n, c in self.commands.items()])


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.argument("tools", nargs=-1)
def completion(shell: str, tools: Sequence[str]) -> None:
    """Print a shell's completion script for the named tools, or for all."""
    from click.shell_completion import get_completion_class

    known = registered()
    for name in tools or [*known, "tuneutils"]:
        if name not in known and name != "tuneutils":
            load(name)
        found = get_completion_class(shell)
        assert found is not None
        click.echo(found(dispatcher, {}, name, completion_variable(name)).source())


@click.command("man")
@click.argument("tool")
def man(tool: str) -> None:
    """Print a tool's manual page, for man -l -."""
    from tuneutils.shared.man import manual_page

    entry = registered().get(tool.replace("_", "-"))
    command = load(tool)
    click.echo(
        manual_page(command, tool.replace("_", "-"), describe(entry).purpose if entry else ""), nl=False
    )


dispatcher = Dispatcher(
    "tuneutils",
    commands=[completion, man],
    help="Small tools for language-model post-training that exchange artifacts on disk.",
    epilog="tuneutils TOOL --help shows a tool's options.",
    context_settings=context_settings("tuneutils"),
    params=[version_option("tuneutils")],
    no_args_is_help=False,
)


def main(args: Sequence[str] | None = None) -> Any:
    """Run ``tuneutils``: the named tool as if it had been called by its own name."""
    argv = sys.argv[1:] if args is None else list(args)
    if not argv:
        argv = ["--help"]
    name = argv[0].replace("_", "-")
    if name.startswith("-") or name in dispatcher.commands or completion_variable("tuneutils") in os.environ:
        sys.exit(run_command(dispatcher, argv, "tuneutils"))
    loaded: list[click.Command] = []
    code = guarded("tuneutils", lambda: loaded.append(load(name)), verbose="-v" in argv)
    sys.exit(run_command(loaded[0], argv[1:], name) if loaded else code)


if __name__ == "__main__":
    main()
