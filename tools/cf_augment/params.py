"""The parameters of ``cf-augment`` and its subcommands."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

AXES = ("gender", "ethnicity", "religion", "age", "disability", "nationality", "orientation", "ses")


@dataclass(frozen=True, kw_only=True)
class WriteParams:
    """What is swapped, which way, and what is written."""

    axis: tuple[str, ...] = option(
        ("gender",), help="What to swap; a twin for each axis given. Repeatable.", choices=AXES
    )
    mode: str = option(
        "augment",
        help="augment: records and their twins. twins: these alone. substitute: in the records' place.",
        choices=("augment", "twins", "substitute"),
    )
    probability: float = option(
        1.0, help="Share of records that get twins, or are substituted.", min=0, max=1
    )
    to: str = option(
        "swap",
        help="gender: swap both ways, or make all persons female, male or neutral (singular they).",
        choices=("swap", "female", "male", "neutral"),
    )
    persons: str = option(
        "all",
        help="gender: all persons of a record at once, or a twin for each, the others as they are.",
        choices=("all", "each"),
    )
    names: bool = option(True, help="gender: change first names with the pronouns and nouns of a person.")
    pair: tuple[str, ...] = option(
        (),
        help="Other axes: swap only these two groups, e.g. christian=muslim. Repeatable.",
        metavar="GROUP=GROUP",
    )
    lexicon: tuple[str, ...] = option(
        (),
        help="File of one's own terms, a further axis: tab-separated term, group, slot, flags. Repeatable.",
        metavar="FILE",
    )
    min_confidence: float = option(
        0.6, help="Abstain where the tagger's probability for a pronoun's use is below this.", min=0.5, max=1
    )
    tagger: str = option(
        "own", help="What tells the uses of her and his apart: the shipped model, or spaCy's tags.",
        choices=("own", "spacy"),
    )  # fmt: skip
    lang: str = option(
        "en", help="Language; es and fr (gender) need the command apertium.", choices=("en", "es", "fr")
    )
    spans: str = option("spans", help="Field of character spans to keep aligned, if a record has it.")
    report: str | None = option(
        None, help="JSON file: twins, changes and abstentions, counted and quoted.", role="runtime"
    )
    abstained: str | None = option(
        None, help="Record stream of the records without a twin, each with the reason.", role="runtime"
    )


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """What is compared with gold swaps."""

    axis: str = option("gender", help="What the gold swaps.", choices=AXES)
    to: str = option("swap", help="As in writing.", choices=("swap", "female", "male", "neutral"))
    pair: tuple[str, ...] = option((), help="As in writing. Repeatable.", metavar="GROUP=GROUP")
    split: str = option(
        "heldout",
        help="Which rows: those held out by the hash of both texts, the others, or all.",
        choices=("heldout", "dev", "all"),
    )
    min_exact: float | None = option(None, help="Exit 1 when exact match is below this.", min=0, max=1)
    min_confidence: float = option(0.6, help="As in writing.", min=0.5, max=1)
    tagger: str = option("own", help="As in writing.", choices=("own", "spacy"))
