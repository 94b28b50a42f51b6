"""How often the twins of gold texts are the gold twins."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuneutils.shared.artifact import describe_input, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.errors import GateFailed, ToolError
from tuneutils.shared.records import Reader, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.cf_augment.agreement import base
from tuneutils.tools.cf_augment.axes import make_axes
from tuneutils.tools.cf_augment.edits import Text
from tuneutils.tools.cf_augment.gender import table
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.params import EvalParams, WriteParams
from tuneutils.tools.cf_augment.words import split

RESAMPLES = 10_000


@dataclass
class Tally:
    """What became of gold rows.

    Attributes:
        exact: equal to the gold text, case aside; for a row whose gold is null, no twin.
        decided: rows for which a twin was written or none needed.
        changed: rows whose gold differs from the text; ``false_swaps`` are among the others.
        agreement: rows with a word that differs from gold by *a/an* or by a verb's ending.
        named: rows in which gold changes names; ``consistent`` if ours stand at the same places, one for one.
    """

    rows: int = 0
    exact: int = 0
    exact_case: int = 0
    decided: int = 0
    exact_decided: int = 0
    same: int = 0
    false_swaps: int = 0
    agreement: int = 0
    named: int = 0
    consistent: int = 0
    abstained: Counter[str] = field(default_factory=Counter)


def evaluate(run: Run[EvalParams]) -> dict[str, Any]:
    """Run ``cf-augment eval``; returns the summary.

    Raises:
        GateFailed: exact match is below ``--min-exact``; the report is written all the same.
    """
    inputs = [describe_input("gold", path) for path in run.inputs]
    reader = Reader(
        run.inputs, on_error=run.on_error, quarantine=f"{run.output}.quarantine.jsonl", validate=_check
    )
    with run.artifact("report", inputs) as art:
        tally = Tally()
        with open_writer(art.dir / "errors.jsonl") as errors:
            for error in judged(run.params, _side(reader, run.params.split), tally):
                errors.write(error)
        if not tally.rows:
            raise ToolError(f"{', '.join(reader.paths)}: no gold row on the side {run.params.split!r}")
        art.metrics = report(tally, run.seed)
        write_json(art.dir / "report.json", art.metrics)
    exact = art.metrics["exact"]
    run.log.info(
        "exact %.4f [%.4f, %.4f], n=%d; of those decided %s; abstained %d; false swaps %d of %d",
        exact["value"], *exact["ci95"], tally.rows, art.metrics["exact_of_decided"]["value"],
        tally.abstained.total(), tally.false_swaps, tally.same,
    )  # fmt: skip
    if run.params.min_exact is not None and exact["value"] < run.params.min_exact:
        raise GateFailed(f"exact match {exact['value']}; --min-exact {run.params.min_exact} is not reached")
    return {"output": run.output, "metrics": art.metrics}


def _check(record: Record) -> None:
    for name in ("text", "swapped"):
        if name not in record:
            raise ValueError(f"needs the fields text and swapped; has {', '.join(sorted(record)) or 'none'}")
    if not isinstance(record["text"], str) or not isinstance(record["swapped"], (str, type(None))):
        raise ValueError("fields text and swapped: must be strings, swapped may be null")


def held_out(text: str, swapped: str | None) -> bool:
    """A pair is held out if the first byte of the SHA-256 of both texts is odd: both directions or none."""
    texts = (text, text if swapped is None else swapped)
    return all(hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest()[0] % 2 for t in texts)


def _side(reader: Reader, split: str) -> Iterator[Record]:
    for record in reader:
        if split == "all" or held_out(record["text"], record["swapped"]) == (split == "heldout"):
            yield record


def judged(params: EvalParams, gold: Iterator[Record], tally: Tally) -> Iterator[Record]:
    """Counts every row of ``gold`` into ``tally``; gives those that are not exact, with what was written."""
    (axis,) = make_axes(
        WriteParams(
            axis=(params.axis,), to=params.to, pair=params.pair,
            min_confidence=params.min_confidence, tagger=params.tagger,
        )
    )  # fmt: skip
    for record in gold:
        text = Text(record["text"])
        made = axis.versions([text], b"\0" * 32)
        why = made[0] if made and isinstance(made[0], Undecided) else None
        ours = text.source
        if made and not isinstance(made[0], Undecided):
            ours = text.written(made[0].edits[0])
        _count(tally, text.source, record["swapped"], ours, why)
        if record["swapped"] is None:
            if why is None:
                yield {**record, "ours": ours}
        elif why is not None:
            yield {**record, "reason": why.reason}
        elif ours.lower() != record["swapped"].lower():
            yield {**record, "ours": ours}


def _count(tally: Tally, text: str, gold: str | None, ours: str, why: Undecided | None) -> None:
    tally.rows += 1
    if why is not None:
        tally.abstained[why.kind] += 1
    if gold is None:
        tally.exact += why is not None
        tally.exact_case += why is not None
        return
    tally.same += gold == text
    tally.false_swaps += gold == text and ours != text
    if why is not None:
        return
    tally.decided += 1
    tally.exact += ours.lower() == gold.lower()
    tally.exact_case += ours == gold
    tally.exact_decided += ours.lower() == gold.lower()
    old, expected, got = split(text)[0], split(gold)[0], split(ours)[0]
    if len(old) == len(expected) == len(got):
        tally.agreement += any(_agreement(a, b) for a, b in zip(expected, got))
        changed = [k for k, (a, b) in enumerate(zip(old, expected)) if a != b and _is_name(a)]
        if changed:
            tally.named += 1
            tally.consistent += _consistent(old, got, changed)


def _agreement(expected: str, got: str) -> bool:
    a, b = expected.lower(), got.lower()
    return a != b and ({a, b} == {"a", "an"} or base(a) == b or base(b) == a)


def _is_name(word: str) -> bool:
    return any(e.kind == "name" for e in table(True).alone(word))


def _consistent(old: Sequence[str], got: Sequence[str], changed: Sequence[int]) -> bool:
    """Every name that gold changes is changed, and each has one counterpart of its own."""
    pairs = {(old[k], got[k]) for k in changed}
    return (
        all(a != b for a, b in pairs)
        and len({a for a, _ in pairs}) == len(pairs)
        and len({b for _, b in pairs}) == len(pairs)
    )


def report(tally: Tally, seed: int) -> dict[str, Any]:
    """Shares with n and bootstrap intervals (percentile, 95 %); null where n is 0."""
    return {
        "exact": share(tally.exact, tally.rows, seed),
        "exact_case_sensitive": share(tally.exact_case, tally.rows, seed),
        "exact_of_decided": share(tally.exact_decided, tally.decided, seed),
        "agreement_errors": share(tally.agreement, tally.decided, seed),
        "name_consistency": share(tally.consistent, tally.named, seed),
        "false_swaps": share(tally.false_swaps, tally.same, seed),
        "abstained": dict(sorted(tally.abstained.items())),
    }


def share(count: int, n: int, seed: int) -> dict[str, Any]:
    """A share with its interval: resampling n rows of which ``count`` hold is a binomial draw."""
    if not n:
        return {"value": None, "n": 0, "ci95": None}
    import numpy as np

    draws = np.random.default_rng(seed).binomial(n, count / n, RESAMPLES) / n
    low, high = (round(float(x), 4) for x in np.percentile(draws, (2.5, 97.5)))
    return {"value": round(count / n, 4), "n": n, "ci95": [low, high]}
