"""The command that every tool is made from.

A tool writes one frozen dataclass of parameters and one function::

    @dataclass(frozen=True)
    class Params:
        rank: int = option(16, help="Rank of the update.", min=1)

    @tool("rank-tune", Params, group="train", inputs="RECORDS", output="adapter")
    def main(run: Run[Params]) -> Summary:
        '''Fine-tune something.'''
        from .tune import tune
        return tune(run)

Options, environment variables, ``--params`` sections, ``--dry-run``, exit codes, logging and the
manifest's parameter list all come from the dataclass fields. Importing this module loads no heavy library.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import click

from tuneutils.shared.errors import ExitCode, ToolError, UpToDate
from tuneutils.shared.exits import run_command
from tuneutils.shared.options import (
    click_options,
    common_options,
    context_settings,
    option,
    version_option,
)

if TYPE_CHECKING:
    from logging import Logger

    from tuneutils.shared.artifact import Artifact

P = TypeVar("P")
Summary = Mapping[str, Any]
SOURCES = {"commandline": "flag", "environment": "environment", "default_map": "params"}

__all__ = ["Progress", "Run", "Summary", "ToolCommand", "ToolGroup", "option", "tool", "tool_group"]


@dataclasses.dataclass
class Run(Generic[P]):
    """One invocation of a tool: its typed parameters and everything all tools have in common."""

    tool: str
    params: P
    inputs: tuple[str, ...] = ()
    output: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False
    quiet: bool = False
    verbose: bool = False
    json: bool = False
    dry_run: bool = False
    on_error: str = "stop"
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    uses_model: bool = True

    @property
    def log(self) -> Logger:
        import logging

        return logging.getLogger(f"tuneutils.{self.tool}")

    def manifest_params(self) -> dict[str, dict[str, Any]]:
        """Every parameter that can change the output, with where its value came from.

        Secrets in URLs are left out: this is recorded and shown.
        """
        from tuneutils.shared.manifest import without_secrets

        out: dict[str, dict[str, Any]] = {}
        for field in dataclasses.fields(cast(Any, self.params)):
            if field.metadata.get("role") in ("runtime", "view"):
                continue
            value = getattr(self.params, field.name)
            value = list(value) if isinstance(value, tuple) else value
            out[field.name] = {
                "value": without_secrets(value),
                "source": self.sources.get(field.name, "default"),
            }
        for name in ("dtype", "on_error") if self.uses_model else ("on_error",):
            out[name] = {"value": getattr(self, name), "source": self.sources.get(name, "default")}
        return out

    def artifact(self, kind: str, inputs: Sequence[Any] = ()) -> Artifact:
        """The output directory as an atomic artifact; see ``artifact.Artifact``.

        Raises:
            UpToDate: the output exists and matches.
            ToolError: it exists and differs, and ``--force`` was not given (exit 73).
        """
        from tuneutils.shared.artifact import Artifact

        if self.output is None or self.output == "-":
            raise ToolError("a directory artifact cannot go to stdout; name it with -o", code=ExitCode.USAGE)
        return Artifact.open(self, kind, inputs)

    def progress(self, total: int | None, desc: str, unit: str = "it") -> Progress:
        return Progress(self, total, desc, unit)


class Progress:
    """A bar with rate and ETA on a terminal, at most ten plain lines otherwise, none with ``-q``."""

    def __init__(self, run: Run[Any], total: int | None, desc: str, unit: str) -> None:
        self._run, self._total, self._desc, self._unit = run, total, desc, unit
        self._done = 0
        self._shown = 0
        self._bar: Any = None
        if not run.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=desc, unit=unit, file=sys.stderr, dynamic_ncols=True)

    def update(self, n: int = 1, **shown: Any) -> None:
        self._done += n
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
            return
        tenth = int(10 * self._done / self._total) if self._total else 0
        if tenth > self._shown:
            self._shown = tenth
            extra = "".join(f", {k} {v}" for k, v in shown.items())
            self._run.log.info("%s: %d of %s %s%s", self._desc, self._done, self._total, self._unit, extra)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


class ToolCommand(click.Command):
    """A Click command whose failures are one line with a meaningful exit code."""

    tool_name: str = ""
    group: str = ""
    params_class: type | None = None

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        sys.exit(run_command(self, args, prog_name or self.tool_name, **extra))


class ToolGroup(click.Group):
    """A tool with subcommands (``pref-collect serve``); with ``default`` set, that one may go unnamed."""

    tool_name: str = ""
    group: str = ""  # type: ignore[assignment]  # hides a decorator of Click's that no tool uses
    default: str | None = None

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        sys.exit(run_command(self, args, prog_name or self.tool_name, **extra))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asks = {"-h", "--help", "--version"}
        if self.default and (not args or (args[0] not in self.commands and args[0] not in asks)):
            args = [self.default, *args]
        return super().parse_args(ctx, args)


def tool_group(name: str, *, group: str, help: str, default: str | None = None) -> ToolGroup:  # noqa: A002
    """A tool made of subcommands; add them with ``@tool(..., parent=that_group)``."""
    made = ToolGroup(name=name, help=help, context_settings=context_settings(name))
    made.tool_name, made.group, made.default = name, group, default
    made.params.append(version_option(name))
    return made


def tool(
    name: str,
    params_class: type[P],
    *,
    group: str,
    inputs: str | None = None,
    many: bool = True,
    stdin: bool = True,
    output: str | None = None,
    streams: bool = False,
    uses_model: bool = True,
    plan: Callable[[Run[P]], Summary] | None = None,
    parent: ToolGroup | None = None,
) -> Callable[[Callable[[Run[P]], Summary | None]], ToolCommand]:
    """Make a command of a function that takes a ``Run``.

    Args:
        name: the command's name; of a subcommand, its name below ``parent``.
        group: the heading under which ``tuneutils --help`` lists it.
        inputs: what the positional arguments are, in capitals; None for none.
        many: any number of inputs rather than one.
        stdin: without an input, read stdin unless that is a terminal.
        output: what ``-o`` names; None when the tool writes nothing.
        streams: the output is a record stream, stdout by default.
        uses_model: adds ``--device`` and ``--dtype``.
        plan: more for ``--dry-run`` to show (parameter counts, memory), computed without weights.
    """
    full_name = f"{parent.tool_name} {name}" if parent else name

    def decorate(function: Callable[[Run[P]], Summary | None]) -> ToolCommand:
        def callback(**values: Any) -> int:
            run = _make_run(full_name, params_class, values, inputs, many, stdin, uses_model)
            return _execute(run, function, plan, output, streams)

        arguments: list[click.Parameter] = []
        if inputs is not None:
            arguments.append(
                click.Argument(["inputs"], metavar=f"[{inputs}]..." if many else inputs, nargs=-1)
            )
        options: list[click.Parameter] = [
            *arguments,
            *click_options(params_class),
            *common_options(output=output, uses_model=uses_model, streams=streams),
            version_option(full_name),
        ]
        made = ToolCommand(
            name=name,
            callback=callback,
            params=options,
            help=function.__doc__,
            context_settings=context_settings(full_name),
        )
        made.tool_name, made.group, made.params_class = full_name, group, params_class
        if inputs is not None and not many:
            made.params[0].metavar = inputs
        if parent is not None:
            parent.add_command(made)
        return made

    return decorate


def _make_run(
    name: str,
    params_class: type[P],
    values: dict[str, Any],
    inputs: str | None,
    many: bool,
    stdin: bool,
    uses_model: bool,
) -> Run[P]:
    context = click.get_current_context()
    if os.environ.get("NO_COLOR"):
        context.color = False
    sources = {}
    for key in values:
        source = context.get_parameter_source(key)
        sources[key] = SOURCES.get(source.name.lower(), "default") if source else "default"
    fields = {f.name for f in dataclasses.fields(cast(Any, params_class))}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in fields}
    common = {k: v for k, v in values.items() if k not in fields and k != "inputs"}
    paths = tuple(values.get("inputs") or ())
    if inputs is not None and not paths:
        if not stdin or sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError(f"missing {inputs}", context)
        paths = ("-",)
    if not many and len(paths) > 1:
        raise click.UsageError(f"takes one {inputs}, got {len(paths)}", context)
    if paths.count("-") > 1:
        raise click.UsageError("stdin (-) can be read only once", context)
    run = Run(
        tool=name,
        params=params_class(**given),
        inputs=paths,
        sources=sources,
        uses_model=uses_model,
        **common,
    )
    _configure_logging(run)
    return run


def _execute(
    run: Run[P],
    function: Callable[[Run[P]], Summary | None],
    plan: Callable[[Run[P]], Summary] | None,
    output: str | None,
    streams: bool,
) -> int:
    if output is not None and not streams and run.output is None and not (run.dry_run or _views(run)):
        raise click.UsageError(f"missing -o: where to write the {output}", click.get_current_context())
    if streams and run.json and run.output == "-":
        raise click.UsageError(
            "--json and data cannot both go to stdout; name a file with -o", click.get_current_context()
        )
    if run.dry_run:
        _print_json(_dry_run(run, plan))
        return ExitCode.OK
    try:
        summary = function(run)
    except UpToDate as done:
        run.log.info("%s is up to date", run.output)
        summary = {"output": run.output, "up_to_date": True, "metrics": done.manifest.get("metrics", {})}
    if run.json:
        _print_json(summary or {})
    return ExitCode.OK


def _views(run: Run[Any]) -> bool:
    """Whether an option of role ``view`` is set: the tool then shows something and writes nothing."""
    fields = dataclasses.fields(cast(Any, run.params))
    return any(f.metadata.get("role") == "view" and getattr(run.params, f.name) for f in fields)


def _dry_run(run: Run[P], plan: Callable[[Run[P]], Summary] | None) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "tool": run.tool,
        "inputs": list(run.inputs),
        "output": run.output,
        "seed": run.seed,
        "params": run.manifest_params(),
    }
    if plan is not None:
        shown.update(plan(run))
    return shown


def _print_json(value: Mapping[str, Any]) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _configure_logging(run: Run[Any]) -> None:
    import logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{run.tool}: %(message)s"))
    root = logging.getLogger("tuneutils")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(logging.WARNING if run.quiet else logging.DEBUG if run.verbose else logging.INFO)
    if not run.verbose:
        _quiet_libraries()


def _quiet_libraries() -> None:
    """Keep what libraries say to their own developers off stderr; ``-v`` shows it."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
