"""What is written down of the tools, made from the tools: ``python -m tuneutils.shared.docs [--check]``.

Rewrites the options in each ``tools/*/README.md``, the table of tools in ``README.md`` and
``params.schema.json``, a JSON Schema of ``params.yaml``.
Only text between a pair of markers (``<!-- options -->`` … ``<!-- /options -->``) is touched.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click

from tuneutils.shared.dispatch import ENTRY_POINTS, GROUPS, describe
from tuneutils.shared.schema import schema

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "params.schema.json"


def entries(root: Path = ROOT) -> list[EntryPoint]:
    """The tools as ``pyproject.toml`` lists them, installed or not."""
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed: dict[str, str] = project.get("entry-points", {}).get(ENTRY_POINTS, {})
    return [EntryPoint(name, value, ENTRY_POINTS) for name, value in sorted(listed.items())]


def documents(root: Path = ROOT) -> Iterator[tuple[Path, str]]:
    """Every generated file with its content as it should be."""
    found = entries(root)
    for entry in found:
        page = root / "tools" / entry.name.replace("-", "_") / "README.md"
        if page.is_file():
            yield page, _between(page, "options", options_text(entry.load(), entry.name))
    front = root / "README.md"
    if front.is_file():
        yield front, _between(front, "tools", tools_table(found))
    commands = {entry.name: entry.load() for entry in found}
    yield root / SCHEMA, json.dumps(schema(commands, root), indent=2, ensure_ascii=False) + "\n"


def options_text(command: click.Command, name: str) -> str:
    """``--help`` of a command and of each of its subcommands, as Markdown."""
    with command.make_context(name, [], resilient_parsing=True, terminal_width=100) as context:
        return "\n\n".join(f"```text\n{text.rstrip()}\n```" for text in _help_texts(context))


def _help_texts(context: click.Context) -> Iterator[str]:
    yield context.get_help()
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            below = context.command.get_command(context, name)
            assert below is not None
            yield from _help_texts(below.make_context(name, [], parent=context, resilient_parsing=True))


def tools_table(found: list[EntryPoint]) -> str:
    """A Markdown table of all tools by group."""
    tools = sorted((describe(e) for e in found), key=lambda t: (*_rank(t.group), t.entry.name))
    rows = [
        f"| {t.group} | [`{t.entry.name}`](tools/{t.entry.name.replace('-', '_')}/README.md) | {t.purpose} |"
        for t in tools
    ]
    return "\n".join(["| group | tool | one job |", "|---|---|---|", *rows])


def _rank(group: str) -> tuple[int, str]:
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def _between(path: Path, marker: str, text: str) -> str:
    """The file's text with ``text`` between its pair of markers, or unchanged without one."""
    old = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old)


def main() -> int:
    """Write what differs, or with ``--check`` only name it and fail."""
    check = "--check" in sys.argv[1:]
    stale = [(p, t) for p, t in documents() if not p.is_file() or p.read_text(encoding="utf-8") != t]
    for path, text in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}\n")
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        sys.stderr.write("run: python -m tuneutils.shared.docs\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
