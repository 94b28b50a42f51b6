"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from tuneutils.shared.errors import ExitCode, ToolError, UpToDate, nearest


def run_command(command: click.Command, args: Sequence[str] | None, prog_name: str, **extra: Any) -> int:
    """Parse ``args`` (``sys.argv`` for None), run the command, and give its exit code.

    Click's own ``main`` would turn a broken pipe into exit 1 and a truncated read into an interrupt.
    """
    argv = sys.argv[1:] if args is None else list(args)
    variable = completion_variable(prog_name)
    if variable in os.environ:
        command.main(argv, prog_name, complete_var=variable, standalone_mode=False, **extra)

    def call() -> Any:
        with command.make_context(prog_name, argv, **extra) as context:
            return command.invoke(context)

    return guarded(prog_name, call, verbose=bool({"-v", "--verbose"} & set(argv)))


def completion_variable(prog_name: str) -> str:
    """The environment variable by which a shell asks a command for completions."""
    return "_" + prog_name.replace("-", "_").replace(" ", "_").upper() + "_COMPLETE"


def guarded(name: str, call: Callable[[], Any], *, verbose: bool = False) -> int:
    """Run ``call`` and turn whatever it raises into one line on stderr and an exit code."""
    _terminate_cleanly()
    code = _guarded(name, call, verbose)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _silence_stdout()
    return code


def _guarded(name: str, call: Callable[[], Any], verbose: bool) -> int:
    try:
        result = call()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except UpToDate:
        return ExitCode.OK
    except BrokenPipeError:
        _silence_stdout()
        return ExitCode.BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        _say(name, "interrupted")
        return ExitCode.INTERRUPTED
    except click.UsageError as exc:
        where = exc.ctx.command_path if exc.ctx else name
        _say(name, f"{_usage_message(exc)}; see: {where} --help")
        return ExitCode.USAGE
    except click.ClickException as exc:
        _say(name, exc.format_message())
        return exc.exit_code
    except Exception as exc:
        if verbose:
            import traceback

            traceback.print_exc()
        message, code = describe(exc)
        _say(name, message)
        return code


def describe(exc: Exception) -> tuple[str, int]:
    """The line and the exit code for an exception that reached the top of a command."""
    text = " ".join(str(exc).split())
    if isinstance(exc, ToolError):
        return text, exc.code
    if _is_out_of_memory(exc):
        return (
            "out of memory; try half the --batch-size, a shorter --max-length, or --gradient-checkpointing",
            ExitCode.RETRYABLE,
        )
    if isinstance(exc, OSError) and exc.errno is not None:
        return _describe_os_error(exc)
    if "No space left on device" in text:
        return f"output: {text[:200]}", ExitCode.CANNOT_WRITE
    if isinstance(exc, ModuleNotFoundError) and not (exc.name or "tuneutils").startswith("tuneutils"):
        return f"the package {exc.name!r} is not installed; run: pip install {exc.name}", ExitCode.UNAVAILABLE
    return (
        f"bug: {type(exc).__name__}: {text[:300]} (-v shows the traceback; please report it)",
        ExitCode.BUG,
    )


def _describe_os_error(exc: OSError) -> tuple[str, int]:
    if isinstance(exc, (ConnectionError, TimeoutError)):
        return f"network: {exc.strerror}; try again", ExitCode.RETRYABLE
    line = f"{exc.filename or 'output'}: {(exc.strerror or 'cannot write').lower()}"
    if isinstance(exc, FileNotFoundError):
        return line, ExitCode.MISSING_INPUT
    return line, ExitCode.CANNOT_WRITE


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """Turns running out of memory meanwhile into exit 75 with the options to try: ``try ADVICE``."""
    try:
        yield
    except Exception as exc:
        if not _is_out_of_memory(exc):
            raise
        raise ToolError(f"out of memory; try {advice}", code=ExitCode.RETRYABLE) from exc


def _is_out_of_memory(exc: Exception) -> bool:
    import errno

    text = str(exc)
    named = isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
    refused = isinstance(exc, OSError) and exc.errno == errno.ENOMEM
    return named or refused or "can't allocate memory" in text or "not enough memory" in text


def _usage_message(exc: click.UsageError) -> str:
    message = " ".join(exc.format_message().split()).rstrip(".")
    if isinstance(exc, click.NoSuchOption) and exc.ctx is not None:
        known = [o for p in exc.ctx.command.params for o in (*p.opts, *p.secondary_opts)]
        return f"no such option {exc.option_name!r}" + nearest(exc.option_name.replace("_", "-"), known)
    return message[:1].lower() + message[1:]


def _say(name: str, message: str) -> None:
    try:
        sys.stderr.write(f"{name}: error: {message}\n")
        sys.stderr.flush()
    except OSError:
        pass


def _silence_stdout() -> None:
    """Keep the interpreter's own flush at exit from reporting the broken pipe or full disk a second time."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file behind it, or closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process


def _terminate_cleanly() -> None:
    """SIGTERM unwinds the stack, so that temporary outputs are removed."""
    import signal
    import threading

    def stop(_signum: int, _frame: Any) -> None:
        sys.exit(143)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
