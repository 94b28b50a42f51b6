"""The axes, by name, from the parameters."""

from __future__ import annotations

import math

from tuneutils.tools.cf_augment.gender import GenderAxis, GenderOptions
from tuneutils.tools.cf_augment.params import WriteParams
from tuneutils.tools.cf_augment.twins import Axis


def make_axes(params: WriteParams) -> list[Axis]:
    """One object for each axis asked for, in order, none twice."""
    made: list[Axis] = []
    for name in dict.fromkeys(params.axis):
        if name == "gender":
            p = params.min_confidence
            odds = math.log(p / (1 - p)) if p < 1 else math.inf
            made.append(GenderAxis(GenderOptions(params.to, params.names, odds)))
    return made
