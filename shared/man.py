"""Manual pages in roff, out of a command's own Click metadata."""

from __future__ import annotations

import click

from tuneutils.shared.errors import ExitCode
from tuneutils.shared.options import version

EXIT_STATUS = {
    ExitCode.OK: "done, or up to date",
    ExitCode.GATE_FAILED: "ran, and the answer is no",
    ExitCode.USAGE: "wrong usage",
    ExitCode.BAD_DATA: "bad data",
    ExitCode.MISSING_INPUT: "an input is missing",
    ExitCode.UNAVAILABLE: "a package or device is missing",
    ExitCode.BUG: "a bug",
    ExitCode.CANNOT_WRITE: "the output cannot be written",
    ExitCode.RETRYABLE: "out of memory; may succeed when retried",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.BROKEN_PIPE: "the reader of stdout went away",
}


def manual_page(command: click.Command, name: str, purpose: str) -> str:
    """The page of section 1 for a command and its subcommands."""
    heading = f'.TH "{name.upper()}" "1" "" "tuneutils {version()}" "tuneutils"'
    lines = [heading, ".SH NAME", rf"{_escape(name)} \- {_escape(purpose)}"]
    with command.make_context(name, [], resilient_parsing=True) as context:
        lines += _body(context)
    lines += [".SH EXIT STATUS"]
    for code, meaning in EXIT_STATUS.items():
        lines += [".TP", rf"\fB{code.value}\fR", meaning]
    return "\n".join(lines) + "\n"


def _body(context: click.Context) -> list[str]:
    command = context.command
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [".SH SYNOPSIS", rf"\fB{_escape(context.command_path)}\fR {_escape(usage)}"]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help or ""), ".SH OPTIONS"]
    for param in command.get_params(context):
        shown = param.get_help_record(context)
        if shown is not None:
            lines += [".TP", rf"\fB{_escape(shown[0])}\fR", _escape(shown[1])]
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            lines.append(f'.SH "{name.upper()}"')
            lines += _body(below.make_context(name, [], parent=context, resilient_parsing=True))
    return lines


def _paragraphs(text: str) -> list[str]:
    import inspect

    out: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        out += [".PP", _escape(" ".join(paragraph.split()))] if paragraph.strip("\b \n") else []
    return out


def _escape(text: str) -> str:
    escaped = text.replace("\\", r"\e").replace("-", r"\-")
    return r"\&" + escaped if escaped.startswith((".", "'")) else escaped
