"""Which of several processes that a launcher started for one run this is."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0
