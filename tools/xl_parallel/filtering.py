"""Pairs in, the good ones out; every drop has the reason of the first rule that it breaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.neardup import near_duplicates
from tuneutils.shared.records import Reader, Writer, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.xl_parallel import rules
from tuneutils.tools.xl_parallel.copies import shingles, signatures, skeleton
from tuneutils.tools.xl_parallel.params_pairs import FilterParams

BATCH = 8192


class Filter:
    """Judges batches of pairs; it remembers the pairs kept, to know their copies.

    Attributes:
        unjudged: sides that the language rule let pass: too short, or of a language it does not know.
        unknown: those languages.
    """

    def __init__(self, params: FilterParams) -> None:
        self.params = params
        self.unjudged = 0
        self.unknown: set[str] = set()
        self._seen: set[bytes] = set()

    def reasons(self, records: Sequence[Record]) -> list[str | None]:
        """For each record the first rule that it breaks, or None."""
        src, tgt = [r["src"] for r in records], [r["tgt"] for r in records]
        found: list[str | None] = [None] * len(records)
        for name, dropped in self._text_rules(rules.Side(src), rules.Side(tgt)):
            for i in np.flatnonzero(dropped).tolist():
                found[i] = found[i] or name
        if self.params.min_score is not None:
            for i, record in enumerate(records):
                found[i] = found[i] or self._score_reason(record, self.params.min_score)
        if self.params.langid:
            self._by_language(records, found)
        if self.params.duplicates:
            self._by_copies(src, tgt, found)
        return found

    def _text_rules(self, src: rules.Side, tgt: rules.Side) -> Iterator[tuple[str, rules.Bools]]:
        params = self.params
        yield "empty side", rules.empty_rule(src, tgt)
        yield from rules.length_rule(src, tgt, params).items()
        if params.untranslated:
            yield "untranslated", rules.untranslated_rule(src, tgt)
        if params.placeholders:
            yield "placeholders", rules.placeholder_rule(src, tgt)
        if params.numbers:
            yield "numbers", rules.number_rule(src, tgt)

    def _score_reason(self, record: Record, least: float) -> str | None:
        score = record.get(self.params.score_field)
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            return "no score"
        return "score" if score < least else None

    def _by_language(self, records: Sequence[Record], found: list[str | None]) -> None:
        for side in ("src", "tgt"):
            at = [i for i, reason in enumerate(found) if reason is None]
            langs = [records[i][f"{side}_lang"] for i in at]
            self.unknown |= {la for la in set(langs) if rules.code_of(la) not in rules.known_languages()}
            dropped, unjudged = rules.language_rule([records[i][side] for i in at], langs, self.params)
            self.unjudged += unjudged
            for i, drop in zip(at, dropped.tolist()):
                if drop:
                    found[i] = f"language of {side}"

    def _by_copies(self, src: list[str], tgt: list[str], found: list[str | None]) -> None:
        for i, reason in enumerate(found):
            if reason is None:
                both = f"{skeleton(src[i])}\n{skeleton(tgt[i])}".encode("utf-8", "surrogatepass")
                key = hashlib.blake2b(both, digest_size=16).digest()
                if key in self._seen:
                    found[i] = "duplicate"
                self._seen.add(key)


def filter_pairs(run: Run[FilterParams]) -> dict[str, Any]:
    """Run ``xl-parallel filter``; returns the summary."""
    params = run.params
    inputs = [describe_input("pairs", path) for path in run.inputs]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, formats=("parallel",), on_error=run.on_error, quarantine=quarantine)
    judge = Filter(params)
    counts: Counter[str] = Counter()
    kept: list[Record] = []
    with ExitStack() as stack:
        writer = stack.enter_context(open_writer(str(run.output)))
        dropped = stack.enter_context(open_writer(params.dropped)) if params.dropped else None
        records = iter(reader)
        while batch := list(islice(records, BATCH)):
            for record, reason in zip(batch, judge.reasons(batch)):
                if reason is not None:
                    _drop(record, reason, counts, dropped)
                elif params.near_duplicates is not None:
                    kept.append(record)
                else:
                    writer.write(record)
        for record, reason in _near(kept, params.near_duplicates):
            if reason is not None:
                _drop(record, reason, counts, dropped)
            else:
                writer.write(record)
    metrics = {
        "read": reader.stats.read, "written": writer.written, "dropped": dict(sorted(counts.items())),
        "refused": reader.stats.refused,
    }  # fmt: skip
    if params.langid:
        metrics["language_unjudged"] = judge.unjudged
    if judge.unknown:
        run.log.warning(
            "language not known to the detector, its sides pass unjudged: %s",
            ", ".join(sorted(judge.unknown)),
        )
    origin = inputs[0]
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=origin.licence, source=origin.source)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    run.log.info("%d of %d pairs kept; dropped: %s", writer.written, reader.stats.read, reasons or "none")
    return {"output": run.output, "metrics": metrics}


def _near(kept: list[Record], threshold: float | None) -> Iterator[tuple[Record, str | None]]:
    """The pairs kept so far, those marked whose source and target are like an earlier one's.

    Both sides count: a pair's similarity is that of the n-grams of its two texts together.
    """
    if threshold is None or not kept:
        return
    sets = shingles([f"{r['src']} {r['tgt']}" for r in kept])
    copies = near_duplicates(signatures(sets), lambda i: sets[i], threshold)
    for i, record in enumerate(kept):
        yield record, "near-duplicate" if i in copies else None


def _drop(record: Record, reason: str, counts: Counter[str], sink: Writer | None) -> None:
    counts[reason] += 1
    if sink is not None:
        sink.write({**record, "reason": reason})
