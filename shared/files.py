"""Files that appear under their name only when whole."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuneutils.shared.errors import ExitCode, ToolError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that is synced and renamed to it at the end, or removed on failure.

    A device or a named pipe is given as it is: it cannot be replaced.
    """
    if path.is_dir():
        raise ToolError(f"{path}: is a directory", code=ExitCode.CANNOT_WRITE)
    if path.exists() and not path.is_file():
        yield path
        return
    make_parent(path)
    sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as exc:
        exc.filename = str(path) if exc.filename in (None, str(temporary)) else exc.filename
        raise
    finally:
        temporary.unlink(missing_ok=True)


def make_parent(path: Path) -> None:
    """Make the folder that an output goes into.

    Raises:
        ToolError: it cannot be made (73).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        reason = (exc.strerror or "").lower()
        raise ToolError(f"{path}: cannot write there: {reason}", code=ExitCode.CANNOT_WRITE) from exc


def sweep(path: Path) -> None:
    """Remove the temporary siblings that killed runs of the same output left behind."""
    for left in leftovers(path, "tmp"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def leftovers(path: Path, ending: str) -> Iterator[Path]:
    """The siblings ``.<name>.<pid>.<ending>`` of ``path`` whose process is gone.

    One with our own number is another's: a container starts every process with the same one.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.{ending}"):
        pid = left.name.rsplit(".", 2)[1]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            yield left


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
