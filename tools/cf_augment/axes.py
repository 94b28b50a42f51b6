"""The axes, by name, from the parameters."""

from __future__ import annotations

import math

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.tools.cf_augment.gender import GenderOptions
from tuneutils.tools.cf_augment.gender_axis import GenderAxis
from tuneutils.tools.cf_augment.groups import GroupAxis, parse_pairs
from tuneutils.tools.cf_augment.params import WriteParams
from tuneutils.tools.cf_augment.twins import Axis


def make_axes(params: WriteParams) -> list[Axis]:
    """One object for each axis asked for, in order, none twice.

    Raises:
        ToolError: (2) options that do not go together.
    """
    names = list(dict.fromkeys(params.axis))
    if params.pair and all(name == "gender" for name in names):
        raise ToolError("--pair is for axes other than gender: use --to", code=ExitCode.USAGE)
    made: list[Axis] = []
    used = 0
    for name in names:
        if name == "gender":
            made.append(GenderAxis(gender_options(params)))
            continue
        pairs = parse_pairs(name, params.pair)
        used += len(pairs)
        made.append(GroupAxis(name, pairs))
    if used < len(params.pair):
        raise ToolError(
            f"--pair {params.pair[-1]!r}: no group of {', '.join(names)}; see --axis", code=ExitCode.USAGE
        )
    return made


def gender_options(params: WriteParams) -> GenderOptions:
    p = params.min_confidence
    odds = math.log(p / (1 - p)) if p < 1 else math.inf
    return GenderOptions(params.to, params.names, odds, params.persons)
