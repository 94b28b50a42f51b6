"""Pair each female first name with a male one, by frequency and gender-specificity.

    python -m tuneutils.tools.cf_augment.pair_names -o tools/cf_augment/data/names.tsv

As in Maudslay et al. 2019 ("It's All in the Name", section 3.2) the pairing has the smallest total distance
of all one-to-one pairings. Distance: log10 of the ratio of frequencies, plus the difference of shares that
have the name's own gender times ``--specificity``, plus ``--ethnicity`` where one name is listed as Black,
Asian or Hispanic and the other is not, plus ``--word`` where only one is an ordinary word or a place. Names
of the longer side that are left over get the nearest name of the other gender one way. Needs SciPy, which the
tool itself does not.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tuneutils.shared.lexicons import Name, load_names


def distances(rows: Sequence[Name], columns: Sequence[Name], weights: Mapping[str, float]) -> np.ndarray:
    """(rows, columns) float64."""

    def features(names: Sequence[Name]) -> tuple[np.ndarray, ...]:
        return (
            np.array([math.log10(max(n.count, 1)) for n in names]),
            np.array([max(n.female_share, 1 - n.female_share) for n in names]),
            np.array([n.ethnicity.replace("white", "") for n in names]),
            np.array([bool(n.flags) for n in names]),
        )

    (f1, s1, e1, w1), (f2, s2, e2, w2) = features(rows), features(columns)
    total: np.ndarray = (
        np.abs(f1[:, None] - f2)
        + weights["specificity"] * np.abs(s1[:, None] - s2)
        + weights["ethnicity"] * (e1[:, None] != e2)
        + weights["word"] * (w1[:, None] != w2)
    )
    return total


def pair(
    female: Sequence[Name], male: Sequence[Name], weights: Mapping[str, float]
) -> list[tuple[str, str, str]]:
    """(female, male, ways): ``both`` for a pair, else the gender that has this counterpart one way."""
    from scipy.optimize import linear_sum_assignment

    cost = distances(female, male, weights)
    rows, columns = linear_sum_assignment(cost)
    found = [(female[r].text, male[c].text, "both") for r, c in zip(rows, columns)]
    for r in sorted(set(range(len(female))) - set(rows)):
        found.append((female[r].text, male[int(cost[r].argmin())].text, "female"))
    for c in sorted(set(range(len(male))) - set(columns)):
        found.append((female[int(cost[:, c].argmin())].text, male[c].text, "male"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--specificity", type=float, default=2.0)
    parser.add_argument("--ethnicity", type=float, default=2.0)
    parser.add_argument("--word", type=float, default=0.3)
    args = parser.parse_args()
    sides = [[n for n in load_names() if n.group == group] for group in ("female", "male")]
    lines = ["# licence: MIT AND Apache-2.0, as shared/lexicons_data/names.en.tsv", "# female\tmale\tways"]
    lines += ["\t".join(row) for row in pair(sides[0], sides[1], vars(args))]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
