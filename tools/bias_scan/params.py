"""Parameters of ``bias-scan``'s subcommands over data and reports."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

AXES = ("gender", "ethnicity", "religion", "age", "disability", "orientation", "nationality", "ses")


@dataclass(frozen=True)
class DataParams:
    axis: tuple[str, ...] = option(AXES, help="What to look for. Repeatable.", choices=AXES)
    lang: str = option(
        "en",
        help="Language of the lexicons; other than en: gender alone, and --lexicon.",
        choices=("en", "de", "es", "fr", "it", "ru"),
    )
    lexicon: tuple[str, ...] = option(
        (), help="File of one's own terms, a further axis: tab-separated term, group, flags. Repeatable.",
        metavar="FILE",
    )  # fmt: skip
    names: bool = option(
        True, help="Count first names: as gender, and as ethnicity where one alone lists them."
    )
    field: tuple[str, ...] = option(
        (), help="Read only this field of records, e.g. completion. Repeatable.", metavar="FIELD"
    )
    target: tuple[str, ...] = option(
        (), help="Share that a group should have, e.g. gender.female=0.5; else all alike. Repeatable.",
        metavar="AXIS.GROUP=SHARE",
    )  # fmt: skip
    window: int = option(30, help="Words to either side of a mention that count as near it.", min=1, max=200)
    decay: float = option(0.95, help="Weight of a word at a distance of d: decay ** d.", min=0.01, max=1)
    min_mentions: int = option(100, help="Refuse a score of a group with fewer mentions.", min=1)
    sentiment: bool = option(False, help="Score the sampled rows of each group by VADER (English).")
    sample: int = option(
        300, help="Rows of each group to keep for --sentiment and --quotes.", min=10, max=10_000
    )
    quotes: int = option(3, help="Rows to quote of each group, those that lean most.", min=0, max=50)
    words: int = option(8, help="Words to show that lean to each side of a pair.", min=0, max=200)
    fail_above: tuple[str, ...] = option(
        (), help="Exit 1 when a score is above a value, e.g. gender.genbit=0.5. Repeatable.",
        metavar="AXIS.SCORE=VALUE",
    )  # fmt: skip
    compare: str | None = option(None, help="Report of a scan before, to show before against after.")
    workers: int = option(1, help="Processes that scan.", min=1, max=8, role="runtime")
    ray: str | None = option(
        None,
        help="Scan on a Ray cluster at this address; local starts one here.",
        role="runtime",
        metavar="ADDRESS",
    )


@dataclass(frozen=True)
class CompareParams:
    fail_above: tuple[str, ...] = option(
        (), help="Exit 1 when a difference (after minus before) is above a value. Repeatable.",
        metavar="AXIS.SCORE=VALUE",
    )  # fmt: skip
