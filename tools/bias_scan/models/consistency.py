"""Counterfactual consistency: how many outputs change when only a group of people in the input does?

Records are twins as ``cf-augment`` writes them: a source with its ``id``, and twins with ``twin_of``. Of
predictions the score is the share of twins that are given another one (Kusner et al. 2017; Garg et al.
2019). Of rewards it is the share whose score moves by more than a tenth of the sources' standard deviation,
and the mean of the move. Of a language model on plain texts it is how far a text and its twin are apart in
log-likelihood: the gap of counterfactual token fairness (Garg et al. 2019) with log P in place of the
classifier's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneutils.shared.errors import ToolError
from tuneutils.shared.streams import Record
from tuneutils.tools.bias_scan.models.estimates import Measure, cluster, ratio, share
from tuneutils.tools.bias_scan.models.predictors import Classifier, Reward, choose

NAME = "consistency"
TOLERANCE = 0.1


@dataclass(frozen=True)
class Twin:
    """Positions of a source and of its twin in the records."""

    source: int
    twin: int
    axis: str


def parse(record: Record) -> list[Record]:
    """The record, or nothing of one with neither ``id`` nor ``twin_of``: it named nobody, and has no twin."""
    return [record] if "id" in record or "twin_of" in record else []


def pair(records: Sequence[Record]) -> list[Twin]:
    """The twins whose source is there too.

    Raises:
        ToolError: there is none.
    """
    sources = {str(r["id"]): i for i, r in enumerate(records) if "twin_of" not in r}
    made = [
        Twin(sources[str(r["twin_of"])], i, str(r.get("twin_axis") or ""))
        for i, r in enumerate(records)
        if "twin_of" in r and str(r["twin_of"]) in sources
    ]
    if not made:
        raise ToolError(
            "consistency: no twin whose source is in the records too; cf-augment write keeps both"
        )
    return made


def paired(records: Sequence[Record]) -> tuple[list[Record], list[Twin]]:
    """The records that are a twin or have one, and the twins by their positions in them."""
    found = pair(records)
    kept = sorted({i for t in found for i in (t.source, t.twin)})
    place = {i: n for n, i in enumerate(kept)}
    twins = [Twin(place[t.source], place[t.twin], t.axis) for t in found]
    return [records[i] for i in kept], twins


def measure(model: Any, records: Sequence[Record]) -> tuple[list[Measure], list[dict[str, Any]]]:
    """Scores of a model's outputs on twins."""
    records, twins = paired(records)
    if isinstance(model, Reward) and not all("chosen" in r for r in records):
        return of_scores(twins, _checked(model.scores, records, ("completion", "messages")))
    if isinstance(model, Reward):
        return of_predictions(twins, _checked(model.predict, records, ("chosen",)))
    if isinstance(model, Classifier):
        return of_predictions(twins, _checked(model.predict, records, ("text",)))
    if all("text" in r for r in records):
        return of_likelihoods(twins, [s.total for s in model.texts([r["text"] for r in records])])
    return of_predictions(twins, _checked(lambda r: choose(model, r), records, ("choices", "chosen", "text")))


def _checked(ask: Any, records: Sequence[Record], fields: tuple[str, ...]) -> list[Any]:
    for record in records:
        if not any(f in record for f in fields):
            raise ToolError(
                f"consistency: this kind of model needs the field {' or '.join(fields)}; "
                f"has {', '.join(record)}"
            )
    try:
        made: list[Any] = ask(records)
    except ValueError as exc:
        raise ToolError(f"consistency: {exc}") from exc
    return made


def of_predictions(
    twins: Sequence[Twin], predictions: Sequence[Any]
) -> tuple[list[Measure], list[dict[str, Any]]]:
    """The share of twins whose prediction is another than the source's."""
    changed = np.array([predictions[t.source] != predictions[t.twin] for t in twins])
    formula = "twins with another prediction than their source / twins"
    rows = [{"axis": t.axis, "source": predictions[t.source], "twin": predictions[t.twin]} for t in twins]
    return [_changed(twins, changed, at, group, formula) for group, at in _groups(twins).items()], rows


def of_scores(twins: Sequence[Twin], scores: Sequence[float]) -> tuple[list[Measure], list[dict[str, Any]]]:
    """The share of twins whose score moves, and the mean move, twin minus source."""
    values = np.asarray(scores, dtype=np.float64)
    moves = np.array([values[t.twin] - values[t.source] for t in twins])
    spread = float(np.std(values[sorted({t.source for t in twins})]))
    formula = f"twins whose score moves by more than {TOLERANCE:g} std of the sources' scores / twins"
    made = []
    for group, at in _groups(twins).items():
        made.append(_changed(twins, np.abs(moves) > TOLERANCE * spread, at, group, formula))
        columns = _units(twins, moves, at)
        text = "mean of score(twin) - score(source)"
        extra = {"source_std": spread}
        made.append(
            Measure(
                NAME,
                "mean-move",
                text,
                columns,
                ratio,
                len(at),
                group,
                neutral=0.0,
                extra=extra,
                unit="twins",
            )
        )
    rows = [{"axis": t.axis, "source": float(values[t.source]), "twin": float(values[t.twin])} for t in twins]
    return made, rows


def of_likelihoods(
    twins: Sequence[Twin], values: Sequence[float]
) -> tuple[list[Measure], list[dict[str, Any]]]:
    """How far twins are from their source, and how often the source is likelier.

    Args:
        values: log-likelihood of each record's text, nats.
    """
    moves = np.array([values[t.twin] - values[t.source] for t in twins])
    made = []
    for group, at in _groups(twins).items():
        for metric, formula, found, neutral in (
            ("likelihood-gap", "mean of |log P(twin) - log P(source)|, nats a text", np.abs(moves), 0.0),
            (
                "source-preference",
                "100 * (log P(source) > log P(twin)) / twins",
                100.0 * ((moves < 0) + 0.5 * (moves == 0)),
                50.0,
            ),
        ):
            columns = _units(twins, found, at)
            made.append(
                Measure(NAME, metric, formula, columns, ratio, len(at), group, neutral=neutral, unit="twins")
            )
    rows = [{"axis": t.axis, "source": float(values[t.source]), "twin": float(values[t.twin])} for t in twins]
    return made, rows


def _changed(twins: Sequence[Twin], changed: Any, at: Sequence[int], group: str, formula: str) -> Measure:
    columns = _units(twins, changed, at)
    return Measure(NAME, "changed", formula, columns, ratio, len(at), group, neutral=0.0, unit="twins")


def _units(twins: Sequence[Twin], values: Any, at: Sequence[int]) -> Any:
    """Twins of one source are resampled together."""
    return cluster(share(np.asarray(values)[list(at)]), [twins[i].source for i in at])


def _groups(twins: Sequence[Twin]) -> Mapping[str, list[int]]:
    groups = {"": list(range(len(twins)))}
    names = sorted({t.axis for t in twins} - {""})
    for name in names if len(names) > 1 else ():
        groups[name] = [i for i, t in enumerate(twins) if t.axis == name]
    return groups
