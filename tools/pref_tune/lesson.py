"""From examples to what the trainer learns: the objective, and the reference's log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tuneutils.shared.artifact import Artifact, library_versions
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name, resolve_device, resolve_dtype
from tuneutils.shared.methods import quantization
from tuneutils.shared.pairs import Pair
from tuneutils.tools.pref_tune.batches import Reader, can_pack, packed_length
from tuneutils.tools.pref_tune.examples import Single, mismatched
from tuneutils.tools.pref_tune.losses import KINDS, SMOOTHED, Objective
from tuneutils.tools.pref_tune.params import TrainParams
from tuneutils.tools.pref_tune.reference import Floats, cached, of_pairs, of_texts
from tuneutils.tools.pref_tune.setup import autocast
from tuneutils.tools.pref_tune.trainer import Lesson, first_used


def objective_of(params: TrainParams) -> Objective:
    """The loss with its constants."""
    return Objective(
        params.loss,
        KINDS[params.loss].beta if params.beta is None else params.beta,
        smoothing=params.label_smoothing if params.loss in SMOOTHED else 0.0,
        gamma=params.gamma,
        desirable_weight=params.desirable_weight,
        undesirable_weight=params.undesirable_weight,
    )


def prepare(
    run: Run[TrainParams],
    art: Artifact,
    model: Any,
    tokenizer: Any,
    config: Any,
    pairs: Sequence[Pair],
    singles: Sequence[Single],
) -> Lesson:
    """The lesson of pairs, or of single answers, with ``model`` as it is now for the reference."""
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    with autocast(model, where, dtype):
        lesson = _of_singles(run, singles) if singles else _of_pairs(run, model, pairs)
        lesson.pad_id = int(tokenizer.pad_token_id)
        if lesson.objective.kind.reference:
            _ask_reference(run, art, model, lesson, first_used(lesson.lengths, config), where, dtype)
    return lesson


def _of_pairs(run: Run[TrainParams], model: Any, pairs: Sequence[Pair]) -> Lesson:
    params = run.params
    sides = [(p.chosen, p.rejected) for p in pairs]
    return Lesson(
        objective_of(params),
        0,
        np.zeros((len(pairs), 2), dtype=np.float32),
        pairs=sides,
        targets=[_target(p, params.soft_labels) for p in pairs],
        margins=[params.margin_scale * p.margin for p in pairs],
        packs=can_pack(model, max(packed_length(s) for s in sides)),
    )


def _target(pair: Pair, soft: bool) -> float:
    if soft:
        return pair.target
    return 1.0 if pair.target > 0.5 else 0.5 if pair.target == 0.5 else 0.0


def _of_singles(run: Run[TrainParams], singles: Sequence[Single]) -> Lesson:
    texts = [one.text for one in singles]
    desirable = [one.desirable for one in singles]
    _say_balance(run, desirable)
    return Lesson(
        objective_of(run.params),
        0,
        np.zeros((len(singles), 2), dtype=np.float32),
        singles=texts,
        desirable=desirable,
        mismatched=mismatched(singles, run.seed, max(len(t.ids) for t in texts)),
    )


def _say_balance(run: Run[TrainParams], desirable: Sequence[bool]) -> None:
    """TRL's advice for KTO is ``λ_D n_D : λ_U n_U`` between 1 : 1 and 4 : 3."""
    good = sum(desirable)
    bad = len(desirable) - good
    ratio = run.params.desirable_weight * good / max(run.params.undesirable_weight * bad, 1e-9)
    if not 0.99 <= ratio <= 1.34:
        run.log.warning(
            "%d good and %d bad answers weigh %.2f : 1; between 1 and 1.33 is advised: "
            "--desirable-weight %.3g would make them equal",
            good,
            bad,
            ratio,
            run.params.undesirable_weight * bad / good,
        )


def _ask_reference(
    run: Run[TrainParams],
    art: Artifact,
    model: Any,
    lesson: Lesson,
    wanted: Sequence[int],
    where: Any,
    dtype: Any,
) -> None:
    """Put the reference's log-probabilities of the examples that will be used into the lesson.

    Those of others are NaN, so that nothing could use them unseen.
    """
    size, pad_id, reader = run.params.batch_size, lesson.pad_id, Reader(model)
    if lesson.pairs:
        sides = [lesson.pairs[i] for i in wanted]
        texts = [text for pair in sides for text in pair]

        def compute() -> Floats:
            return of_pairs(reader, sides, pad_id, size, lesson.packs, where)
    else:
        texts = [t for i in wanted for t in (lesson.singles[i], lesson.mismatched[i])]

        def compute() -> Floats:
            return of_texts(reader, texts, pad_id, size, where).reshape(-1, 2)

    versions = library_versions()
    identity = [art.inputs[0].sha256, dtype_name(dtype), where.type, str(quantization(run.params)), str(size)]
    identity += [f"{name} {versions.get(name)}" for name in ("torch", "transformers")]
    identity += [str(lesson.packs), repr([[t.ids, t.prompt] for t in texts])]
    lesson.reference[:] = np.nan
    lesson.reference[list(wanted)] = cached(art.work, identity, compute)
