"""Pairs with a score by their vectors: the cosine, or a margin over the nearest of all records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.records import Reader, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.xl_parallel.margins import Floats, margin, nearest
from tuneutils.tools.xl_parallel.params_pairs import ScoreParams
from tuneutils.tools.xl_parallel.vectors import Vectors, encoder_input, open_encoder

#: Texts encoded at once.
BATCH = 1 << 14


def score(run: Run[ScoreParams]) -> dict[str, Any]:
    """Run ``xl-parallel score``; returns the summary."""
    params = run.params
    inputs = [*(describe_input("pairs", path) for path in run.inputs), encoder_input(params.encoder)]
    check_stream(run, inputs)
    encoder = open_encoder(params.encoder)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, formats=("parallel",), on_error=run.on_error, quarantine=quarantine)
    records = list(reader)
    x, y = (vectors(records, side, encoder) for side in ("src", "tgt"))
    scores = pair_scores(x, y, params.margin, params.k)
    with open_writer(str(run.output)) as writer:
        for record, value in zip(records, scores.tolist()):
            writer.write({**record, params.field: round(value, 6)})
    low, middle, high = (round(float(q), 4) for q in np.percentile(scores, (10, 50, 90)))
    metrics = {
        "pairs": len(records), "p10": low, "median": middle, "p90": high, "refused": reader.stats.refused,
    }  # fmt: skip
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=inputs[0].licence)
    run.log.info(
        "%d pairs, %s: median %.4f, 10 %% below %.4f, 10 %% above %.4f", len(records), params.margin, middle,
        low, high,
    )  # fmt: skip
    return {"output": run.output, "metrics": metrics}


def vectors(records: Sequence[Record], side: str, encoder: Vectors) -> Floats:
    """``(n, d)``: each record's text of a side, encoded in the record's language."""
    made: list[Floats | None] = [None] * len(records)
    by_lang: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        by_lang.setdefault(record[f"{side}_lang"], []).append(i)
    for lang, at in by_lang.items():
        for start in range(0, len(at), BATCH):
            some = at[start : start + BATCH]
            for i, row in zip(some, encoder.encode([records[i][side] for i in some], lang)):
                made[i] = row
    return np.stack([row for row in made if row is not None])


def pair_scores(x: Floats, y: Floats, kind: str, k: int) -> Floats:
    """``(n,)``: the score of row i of one with row i of the other, both ``(n, d)``.

    Neighbours are sought among the distinct rows, so that copies do not fill them.
    """
    cosines = np.einsum("nd,nd->n", x, y).astype(np.float32)
    if kind == "absolute":
        return cosines
    ahead = nearest(x, np.unique(y, axis=0), k, "exact").mean
    back = nearest(y, np.unique(x, axis=0), k, "exact").mean
    return margin(kind, cosines, (ahead + back) / 2)
