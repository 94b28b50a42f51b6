"""Checkpoints that count only once all of them is written, and only for the run that wrote them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

COMPLETE = "complete"


def mark_complete(folder: Path) -> None:
    """Say that a checkpoint is whole, by a list of its files and their sizes."""
    (folder / COMPLETE).write_text(json.dumps(_sizes(folder)), encoding="utf-8")


def last_checkpoint(folder: Path, identity: str) -> Path | None:
    """The newest whole checkpoint of the same run; anything half written or of another run is removed.

    Args:
        folder: where the trainer keeps its ``checkpoint-N`` folders.
        identity: a hash over all that decides the result; kept in ``folder/identity``.
    """
    mark = folder / "identity"
    if not mark.is_file() or mark.read_text() != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)
        return None
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(whole, key=lambda p: int(p.name.split("-")[1]), default=None)


def _sizes(folder: Path) -> dict[str, int]:
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != COMPLETE)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end and not half removed since."""
    try:
        listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(listed == _sizes(folder))


def run_identity(*parts: Any) -> str:
    """SHA-256 over what decides a run's result, to tell whose a checkpoint is."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
