"""Scores of mean 0 and standard deviation 1 on reference texts (row 8 of the N+ details)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuneutils.shared.command import Run
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.reward_model import RewardModel
from tuneutils.shared.texts import encode_record, shortened
from tuneutils.tools.rm_train.params import TrainParams
from tuneutils.tools.rm_train.scored import Scored, finite

FORMATS = ("prompt-completion", "messages", "unpaired")


def open_demonstrations(run: Run[TrainParams]) -> Source | None:
    """The records that ``--normalise`` names, hashed but not yet read; None where it names none."""
    path = run.params.normalise
    if path in ("chosen", "all", "none"):
        return None
    return open_source(run, [path], "demonstrations", formats=FORMATS)


def measured_on(
    run: Run[TrainParams], rm: RewardModel, sample: Scored, demonstrations: Source | None
) -> tuple[float, float]:
    """Mean and standard deviation of raw scores.

    Args:
        sample: training pairs with their scores.

    Raises:
        GateFailed: all scores are the same, so that nothing could be learnt from them.
    """
    if demonstrations is not None:
        scores: Sequence[float] = _demonstrated(run, rm, demonstrations)
    elif run.params.normalise == "chosen":
        scores = sample.chosen.tolist()
    else:
        scores = [*sample.chosen.tolist(), *sample.rejected.tolist()]
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if not std > 1e-6 * max(1.0, abs(mean)):
        raise GateFailed(
            f"the reward model gives each of {len(scores)} texts the score {mean:.4g}: nothing was learnt; "
            "train longer or with another --learning-rate, or give --normalise more texts"
        )
    return mean, std


def _demonstrated(run: Run[TrainParams], rm: RewardModel, source: Source) -> list[float]:
    rows, places = [], []
    for item in source.located:
        try:
            text = encode_record(item.record, rm.tokenizer, rm.template)
            if run.params.too_long == "error" and len(text.ids) > rm.max_length:
                raise ValueError(f"has {len(text.ids)} tokens, more than {rm.max_length}")
            rows.append(shortened(text, rm.max_length).ids)
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
            continue
        places.append(item.place)
    if not rows:
        raise ToolError(f"{run.params.normalise}: no demonstration left")
    made = rm.scores(rows, 2 * run.params.batch_size, raw=True)
    for place, score in zip(places, made, strict=True):
        finite(score, place)
    return made
