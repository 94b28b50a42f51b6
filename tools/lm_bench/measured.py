"""What passes between measuring and reporting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tuneutils.tools.lm_bench.metrics import Item


@dataclass
class Measured:
    """What was found out about one model.

    Attributes:
        info: parameters, bytes, precision; deterministic.
        exams: name → kind, metrics and settings.
        items: exam's name → its items, in order.
    """

    label: str
    info: dict[str, Any]
    exams: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, list[Item]] = field(default_factory=dict)
