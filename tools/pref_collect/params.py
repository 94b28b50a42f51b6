"""The options of each subcommand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tuneutils.shared.command import option

DB_HELP = "Where answers are kept: sqlite:///FILE (or just FILE) or postgresql://USER@HOST/NAME."


def _db() -> Any:
    # Never part of a manifest: it may hold a password.
    return option("sqlite:///study.db", help=DB_HELP, metavar="URL", role="runtime")


@dataclass(frozen=True, kw_only=True)
class StudyParams:
    """How a study is run; what `serve` and `simulate` have in common."""

    mode: str = option(
        "auto",
        help="Compare two completions or rate one; auto: by what the records hold.",
        choices=("auto", "compare", "rate"),
    )
    overlap: int = option(1, help="Raters for each item.", min=1)
    per_rater: int | None = option(None, help="Most items for one rater, repeats and gold included.", min=1)
    repeat_share: float = option(
        0.0, help="Share of a rater's items that come a second time, for self-consistency.", min=0.0, max=1.0
    )
    repeat_gap: int = option(10, help="Fewest items between an item and its repeat.", min=1)
    gold_every: int = option(
        10, help="One gold item (a record with the field `gold`) in this many of a rater's items.", min=2
    )
    order: str = option(
        "random", help="Order of the items: seeded, or that of the file.", choices=("random", "file")
    )
    aspect: tuple[str, ...] = option((), help="Also ask for this aspect; give it once for each.")


@dataclass(frozen=True, kw_only=True)
class ServeParams(StudyParams):
    db: str = _db()
    host: str = option("127.0.0.1", help="Address to listen on.", role="runtime")
    port: int = option(8700, help="Port to listen on; 0 takes a free one.", min=0, max=65535, role="runtime")
    allow_remote: bool = option(
        False, help="Let --host be an address that other machines reach.", role="runtime"
    )
    trusted_host: tuple[str, ...] = option(
        (), help="Host name by which browsers reach the page; others are refused.", role="runtime"
    )
    tls_cert: str | None = option(None, help="Certificate (PEM) to serve HTTPS with.", role="runtime")
    tls_key: str | None = option(None, help="Private key of --tls-cert.", role="runtime")
    behind_https: bool = option(
        False, help="A proxy serves HTTPS: cookies are sent over it only.", role="runtime"
    )
    rater: tuple[str, ...] = option(
        (), help="Make a login for this rater if there is none, and print its link.", role="runtime"
    )
    title: str = option("Which answer is better?", help="Heading of the page.", role="runtime")
    guidelines: str | None = option(
        None, help="Text file with instructions to raters.", metavar="FILE", role="runtime"
    )
    lease_minutes: float = option(
        30.0,
        help="After this long without an answer, an item goes to someone else.",
        min=0.01,
        role="runtime",
    )
    max_body_kib: int = option(256, help="Largest request body.", min=1, role="runtime")
    requests_per_s: float = option(
        20.0,
        help="Requests a second that one rater may make, after a burst of ten times as many.",
        min=0.1,
        role="runtime",
    )


@dataclass(frozen=True, kw_only=True)
class TokensParams:
    db: str = _db()
    renew: bool = option(False, help="New tokens for raters that have one; the old ones end.")
    link: str = option(
        "http://127.0.0.1:8700", help="Address of the page, for the login links.", role="runtime"
    )


@dataclass(frozen=True, kw_only=True)
class SimulateParams(StudyParams):
    raters: int = option(3, help="Simulated raters.", min=1)
    rule: str = option(
        "length",
        help="What they prefer: the longer, the more positive in words, or the higher score.",
        choices=("length", "sentiment", "score"),
    )
    score_field: str = option(
        "score", help="With --rule score: the fields FIELD_a and FIELD_b (FIELD to rate)."
    )
    flip_rate: float = option(0.1, help="Chance that a rater answers the reverse.", min=0.0, max=1.0)
    position_bias: float = option(
        0.0, help="Chance that a rater prefers the left one without reading.", min=0.0, max=1.0
    )


@dataclass(frozen=True, kw_only=True)
class ReportParams:
    resamples: int = option(2000, help="Bootstrap resamples of each interval.", min=100)


@dataclass(frozen=True, kw_only=True)
class ExportParams:
    format: str = option(
        "preference",
        help="TRL's preference or unpaired format, or every vote by itself.",
        choices=("preference", "unpaired", "votes"),
    )
    ties: str = option(
        "drop",
        help="Items without a preferred answer: leave out, or order at random with margin 0.",
        choices=("drop", "random"),
    )
    both_bad: str = option(
        "drop",
        help="Items that most raters call both bad: leave out, or count such votes as equal.",
        choices=("drop", "tie"),
    )
    min_raters: int = option(1, help="Fewest raters of an item.", min=1)
    gold: bool = option(False, help="Export gold items too.")
    edited: bool = option(
        True, help="Preference format: also a pair of each edited answer over the better original."
    )
    split: str | None = option(
        None,
        help="Divide by a hash of the prompt, so that no prompt is on two sides; -o is a folder.",
        metavar="NAME=SHARE,...",
    )


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    model: tuple[str, ...] = option(
        (),
        help="Model artifact; give two to compare them. Without any, INPUT has completions already.",
        short="-m",
        metavar="MODEL",
    )
    completions: int = option(2, help="Completions of a prompt: two to compare, one to rate.", min=1, max=2)
    temperature: float = option(1.0, help="Sampling temperature.", min=0.0)
    top_p: float = option(1.0, help="Nucleus sampling.", min=0.01, max=1.0)
    max_new_tokens: int = option(256, help="Most tokens of a completion.", min=1)
    batch_size: int = option(8, help="Completions made at once.", min=1)
    limit: int | None = option(None, help="Only the first prompts.", min=1)
    select: int | None = option(None, help="Keep this many pairs.", min=1)
    select_by: str = option(
        "rm",
        help="rm: pairs whose score_a and score_b, by a reward model, are closest; random: a seeded sample.",
        choices=("rm", "random"),
    )
