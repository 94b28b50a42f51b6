"""Parameters of ``bias-scan``'s subcommands over models, predictions and leaks."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

TESTS = (
    "crows-pairs",
    "stereoset",
    "bbq",
    "winobias",
    "winogender",
    "weat",
    "seat",
    "likelihood",
    "consistency",
)


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    set: tuple[str, ...] = option(
        help=f"A test and its records: {', '.join(TESTS)}; weat=builtin and seat=builtin are Caliskan's. "
        "Repeatable.",
        metavar="TEST=RECORDS",
    )
    baseline: str | None = option(
        None, help="Label of the model that the others are compared with, item by item.", metavar="LABEL"
    )
    sample: int | None = option(
        None, help="Take only N records of each set (sources with their twins), at random by --seed.", min=1
    )
    min_items: int = option(30, help="Refuse a score of fewer items.", min=2)
    require_fall: tuple[str, ...] = option(
        (),
        help="Exit 1 unless bias falls against --baseline with an interval below zero, e.g. "
        "crows-pairs.sum-logprob. Repeatable.",
        metavar="TEST.SCORE",
    )
    fail_above: tuple[str, ...] = option(
        (), help="Exit 1 when a score is above a value, e.g. crows-pairs.sum-logprob=60. Repeatable.",
        metavar="TEST.SCORE=VALUE",
    )  # fmt: skip
    batch_tokens: int = option(4096, help="Padded tokens of one forward pass.", min=64)
    resamples: int = option(10_000, help="Of the bootstrap.", min=100)
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class PredictionParams:
    prediction: str = option("prediction", help="Field of the prediction.", metavar="FIELD")
    label: str = option(
        "label", help="Field of the right answer; without it only selection rates.", metavar="FIELD"
    )
    group: str = option("group", help="Field of the group of people.", metavar="FIELD")
    score: str = option("score", help="Field of a score, for twins without a prediction.", metavar="FIELD")
    positive: str | None = option(
        None, help="The prediction and label that count as positive; else true or 1.", metavar="VALUE"
    )
    baseline: str | None = option(
        None, help="Label of the stream that the others are compared with, record by record.", metavar="LABEL"
    )
    min_items: int = option(30, help="Refuse a score of fewer records.", min=2)
    require_fall: tuple[str, ...] = option(
        (),
        help="Exit 1 unless a disparity falls against --baseline with an interval below zero. Repeatable.",
        metavar="TEST.SCORE",
    )
    fail_above: tuple[str, ...] = option(
        (), help="Exit 1 when a score is above a value, e.g. fairness.equalized-odds-difference=0.1. "
        "Repeatable.",
        metavar="TEST.SCORE=VALUE",
    )  # fmt: skip
    resamples: int = option(10_000, help="Of the bootstrap.", min=100)


@dataclass(frozen=True, kw_only=True)
class LeakParams:
    against: tuple[str, ...] = option(
        help="Records of a test set that must not be in the training records. Repeatable.", metavar="RECORDS"
    )
    ngram: int = option(8, help="Words of one n-gram.", min=2, max=50)
    near: float = option(
        0.7,
        help="Share of a text's n-grams in one training record that makes it a near copy.",
        min=0.1,
        max=1,
    )
    min_words: int = option(6, help="Texts of fewer words are not looked for: anything may hold them.", min=1)
    fail: bool = option(False, help="Exit 1 when anything leaked.")
