"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from tuneutils.shared.errors import ExitCode, ToolError, UpToDate, nearest


def guarded(name: str, call: Callable[[], Any]) -> int:
    """Run ``call`` and turn whatever it raises into one line on stderr and an exit code."""
    _terminate_cleanly()
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
        if _verbose():
            import traceback

            traceback.print_exc()
        message, code = describe(exc)
        _say(name, message)
        return code


def describe(exc: Exception) -> tuple[str, int]:
    """The line and the exit code for an exception that reached the top of a command."""
    import errno

    if isinstance(exc, ToolError):
        return str(exc), exc.code
    if isinstance(exc, FileNotFoundError):
        return f"{exc.filename}: no such file or directory", ExitCode.MISSING_INPUT
    if isinstance(exc, (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)):
        return f"{exc.filename}: {exc.strerror}", ExitCode.CANNOT_WRITE
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{exc.filename or 'output'}: {exc.strerror}", ExitCode.CANNOT_WRITE
    text = " ".join(str(exc).split())
    if _out_of_memory(exc, text):
        return (
            "out of memory; try half the --batch-size, a shorter --max-length, or --gradient-checkpointing",
            ExitCode.RETRYABLE,
        )
    if "No space left on device" in text:
        return f"output: {text[:200]}", ExitCode.CANNOT_WRITE
    return (
        f"bug: {type(exc).__name__}: {text[:300]} (-v shows the traceback; please report it)",
        ExitCode.BUG,
    )


def _out_of_memory(exc: Exception, text: str) -> bool:
    named = isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in text or "not enough memory" in text


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


def _verbose() -> bool:
    context = click.get_current_context(silent=True)
    asked = {"-v", "--verbose"} & set(sys.argv[1:])
    return bool(asked) or bool(context and context.params.get("verbose"))


def _silence_stdout() -> None:
    """Keep the interpreter's own flush at exit from reporting the broken pipe a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate_cleanly() -> None:
    """SIGTERM unwinds the stack, so that temporary outputs are removed."""
    import signal
    import threading

    def stop(_signum: int, _frame: Any) -> None:
        sys.exit(143)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
