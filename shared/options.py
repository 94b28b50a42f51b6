"""Click options from the fields of a parameter dataclass, and the options that all commands share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import click

from tuneutils.shared.errors import ExitCode, ToolError, nearest

DEVICE_HELP = "Where to compute: auto, cpu, cuda, cuda:N, mps."
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
_MISSING: Any = object()


def option(
    default: Any = _MISSING,
    *,
    help: str,  # noqa: A002 - Click's own word
    choices: Sequence[str] = (),
    min: float | None = None,  # noqa: A002
    max: float | None = None,  # noqa: A002
    short: str = "",
    metavar: str | None = None,
    role: str = "param",
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the default; without one the option is required.
        choices: the values allowed, in the order shown.
        min, max: inclusive bounds of a number.
        short: a one-letter flag such as ``-m``.
        role: ``param`` enters the manifest and the idempotence check; ``runtime`` (logging,
            checkpoint intervals) does not, since it cannot change what is made; ``view`` shows something
            instead of making anything, so that no output need be named.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "min": min,
        "max": max,
        "short": short,
        "metavar": metavar,
        "role": role,
    }
    if default is _MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict, set)):
        raise TypeError("a default must be immutable: use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


def context_settings(name: str) -> dict[str, Any]:
    return {
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "TUNEUTILS_" + name.upper().replace("-", "_").replace(" ", "_"),
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "show_default": True,
        "max_content_width": 100,
    }


def version_option(name: str) -> click.Option:
    def show(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"{name} (tuneutils) {version()}")
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version and exit.",
    )


def version() -> str:
    """The installed version of tuneutils."""
    from importlib.metadata import version as installed

    return installed("tuneutils")


def click_options(params_class: type) -> Iterator[click.Option]:
    """One Click option for each field of a parameter dataclass."""
    import typing

    hints = typing.get_type_hints(params_class)
    for field in dataclasses.fields(params_class):
        yield _click_option(field, hints[field.name])


def _click_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    meta = field.metadata
    kind, multiple = _value_type(hint)
    flag = "--" + field.name.replace("_", "-")
    required = field.default is dataclasses.MISSING
    kwargs: dict[str, Any] = {"help": meta["help"], "required": required, "metavar": meta["metavar"]}
    if not required:
        kwargs["default"] = field.default
    kwargs["show_default"] = not required and field.default is not None and field.default != ()
    names = [field.name] + ([meta["short"]] if meta["short"] else [])
    if kind is bool:
        return click.Option([*names, f"{flag}/--no-{flag[2:]}"], **kwargs)
    return click.Option([*names, flag], type=_click_type(kind, meta), multiple=multiple, **kwargs)


def _value_type(hint: Any) -> tuple[type, bool]:
    """``int | None`` → (int, False); ``tuple[str, ...]`` → (str, True)."""
    import typing

    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return cast(type, args[0]), True
    if args and typing.get_origin(hint) is not None:
        return cast(type, args[0]), False
    return cast(type, hint), False


def _click_type(kind: type, meta: Mapping[str, Any]) -> click.ParamType[Any]:
    if meta["choices"]:
        return click.Choice(meta["choices"])
    if kind is int:
        return click.IntRange(meta["min"], meta["max"]) if _bounded(meta) else click.INT
    if kind is float:
        return FiniteRange(meta["min"], meta["max"]) if _bounded(meta) else Finite()
    return click.STRING


class Finite(click.types.FloatParamType):
    """A number that is neither NaN, which passes every comparison with bounds, nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class FiniteRange(click.FloatRange, Finite):
    """A finite number within bounds."""


def _bounded(meta: Mapping[str, Any]) -> bool:
    return meta["min"] is not None or meta["max"] is not None


def common_options(*, output: str | None, uses_model: bool, streams: bool) -> list[click.Option]:
    """The options that every command has, in the order shown by ``--help``."""
    made: list[click.Option] = []
    if output is not None:
        shown = f"Where the {output} is written" + (", or - for stdout." if streams else ".")
        made.append(
            click.Option(
                ["output", "-o", "--output"], help=shown, metavar="PATH", default="-" if streams else None
            )
        )
    made.append(
        click.Option(
            ["params", "--params"],
            multiple=True,
            is_eager=True,
            expose_value=False,
            metavar="FILE:KEY",
            callback=_load_params,
            help="Take defaults from a section of a YAML file, e.g. params.yaml:lora.common.",
        )
    )
    made.append(
        click.Option(["--seed"], type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of all randomness.")
    )
    if uses_model:
        made.append(click.Option(["--device"], default="auto", help=DEVICE_HELP))
        made.append(
            click.Option(
                ["--dtype"],
                type=click.Choice(DTYPE_CHOICES),
                default="auto",
                help="Precision of the computation.",
            )
        )
    made += [
        click.Option(
            ["--on-error"],
            type=click.Choice(("stop", "skip", "quarantine")),
            default="stop",
            help="What to do with a bad record: stop, skip it, or keep it apart with its reason.",
        ),
        click.Option(["--force"], is_flag=True, help="Replace an output that differs."),
        click.Option(["--dry-run"], is_flag=True, help="Show resolved parameters and outputs; do nothing."),
        click.Option(["--json"], is_flag=True, help="Print one summary object on stdout at the end."),
        click.Option(["-q", "--quiet"], is_flag=True, help="Only warnings and errors on stderr."),
        click.Option(["-v", "--verbose"], is_flag=True, help="More on stderr, and tracebacks."),
    ]
    return made


def _load_params(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
    known = {p.name: p for p in ctx.command.params if p.name and p is not param and p.name != "version"}
    for value in values:
        for key, entry in read_section(value).items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise ToolError(f"{value}: unknown key {key!r}{nearest(name, known)}", code=ExitCode.USAGE)
            if entry is not None:
                default = _as_text(ctx, known[name], entry, f"{value}: key {key!r}")
                ctx.default_map = {**(ctx.default_map or {}), name: default}


def _as_text(ctx: click.Context, param: click.Parameter, entry: Any, place: str) -> Any:
    """A YAML value as text, so that Click judges it as on the command line (1.5 is no integer)."""
    many = param.multiple if isinstance(param, click.Option) else param.nargs == -1
    entries = entry if isinstance(entry, list) else [entry]
    if isinstance(entry, list) and not many:
        raise ToolError(f"{place}: takes one value, not a list", code=ExitCode.USAGE)
    texts = []
    for item in entries:
        if item is None or isinstance(item, (dict, list)):
            raise ToolError(f"{place}: must be a plain value", code=ExitCode.USAGE)
        text = str(item).lower() if isinstance(item, bool) else str(item)
        try:
            param.type.convert(text, param, ctx)
        except click.BadParameter as exc:
            raise ToolError(f"{place}: {exc.message.rstrip('.')}", code=ExitCode.USAGE) from exc
        texts.append(text)
    return texts if many else texts[0]


def read_section(value: str) -> dict[str, Any]:
    """The mapping at ``FILE:dotted.key`` (or the whole file, without a key)."""
    path, _, dotted = value.partition(":")
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            section: Any = yaml.safe_load(stream)
    except yaml.YAMLError as exc:
        raise ToolError(f"{path}: not YAML: {' '.join(str(exc).split())}", code=ExitCode.USAGE) from exc
    for key in dotted.split(".") if dotted else []:
        if not isinstance(section, dict) or key not in section:
            hint = nearest(key, section) if isinstance(section, dict) else ""
            raise ToolError(f"{path}: no section {dotted!r}{hint}", code=ExitCode.USAGE)
        section = section[key]
    if not isinstance(section, dict):
        raise ToolError(f"{value}: not a mapping", code=ExitCode.USAGE)
    return section
