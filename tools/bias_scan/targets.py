"""``--target AXIS.GROUP=SHARE``: the shares that groups should have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.tools.bias_scan.matcher import Matcher


def parse_targets(given: Sequence[str], matcher: Matcher) -> dict[int, NDArray[np.float64]]:
    """Axis → ``(groups,)`` shares; groups that are not named have equal parts of what is left.

    Raises:
        ToolError: no such axis or group, a share that is no share, or shares above 1 in all (2).
    """
    found: dict[int, dict[int, float]] = {}
    known = {f"{matcher.axes[axis]}.{group}": i for i, (axis, group) in enumerate(matcher.groups)}
    for text in given:
        name, _, value = text.rpartition("=")
        if name not in known:
            raise ToolError(f"--target {text}: no such group{nearest(name, known)}", code=ExitCode.USAGE)
        number = known[name]
        found.setdefault(matcher.groups[number][0], {})[number] = _share(text, value)
    return {axis: _shares(axis, named, matcher) for axis, named in found.items()}


def _share(text: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ToolError(f"--target {text}: the share must be between 0 and 1", code=ExitCode.USAGE)
    return share


def _shares(axis: int, named: dict[int, float], matcher: Matcher) -> NDArray[np.float64]:
    members = [i for i, (a, _) in enumerate(matcher.groups) if a == axis]
    left = 1.0 - sum(named.values())
    others = len(members) - len(named)
    if left < -1e-9 or (not others and left > 1e-9):
        raise ToolError(
            f"--target: the shares of {matcher.axes[axis]} sum to {1 - left:g}, not to 1", code=ExitCode.USAGE
        )
    each = max(0.0, left) / others if others else 0.0
    return np.array([named.get(i, each) for i in members])
