"""The axes, by name, from the parameters."""

from __future__ import annotations

import math

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.lexicons import Lexicon, load, load_file
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
    if params.lang != "en" and names != ["gender"]:
        raise ToolError(f"--lang {params.lang} has the axis gender only", code=ExitCode.USAGE)
    if params.pair and not params.lexicon and all(name == "gender" for name in names):
        raise ToolError("--pair is for axes other than gender: use --to", code=ExitCode.USAGE)
    made: list[Axis] = []
    lexicons: list[Lexicon] = []
    used = 0
    for name in names:
        if name == "gender":
            made.append(_gender(params))
            continue
        lexicons.append(load(name))
    lexicons += [load_file(path) for path in params.lexicon]
    for lexicon in lexicons:
        pairs = parse_pairs(lexicon, params.pair)
        used += len(pairs)
        made.append(GroupAxis(lexicon, pairs))
    if used < len(params.pair):
        raise ToolError(
            f"--pair {params.pair[-1]!r}: no group of {', '.join(names)}; see --axis", code=ExitCode.USAGE
        )
    return made


def _gender(params: WriteParams) -> Axis:
    if params.lang == "en":
        return GenderAxis(gender_options(params))
    if params.to == "neutral" or params.persons == "each":
        raise ToolError(
            f"--lang {params.lang} has neither --to neutral nor --persons each", code=ExitCode.USAGE
        )
    from tuneutils.tools.cf_augment.morphology import MorphologyAxis

    return MorphologyAxis(params.lang, params.to)


def gender_options(params: WriteParams) -> GenderOptions:
    p = params.min_confidence
    odds = math.log(p / (1 - p)) if p < 1 else math.inf
    return GenderOptions(params.to, params.names, odds, params.persons, params.tagger)
