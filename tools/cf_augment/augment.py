"""Records in, records with their counterfactual twins out."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, describe_input, sidecar, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.records import Reader, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.cf_augment.axes import make_axes
from tuneutils.tools.cf_augment.fields import validate
from tuneutils.tools.cf_augment.params import WriteParams
from tuneutils.tools.cf_augment.twins import Twin, identity, twins

#: Abstentions that the report quotes, of each kind.
QUOTED = 5


@dataclass
class Counts:
    """What became of the records."""

    records: int = 0
    untouched: int = 0
    not_drawn: int = 0
    twins: Counter[str] = field(default_factory=Counter)
    abstained: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    quoted: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def abstain(self, twin: Twin, source: str) -> None:
        assert twin.why is not None
        self.abstained[twin.why.kind] += 1
        quoted = self.quoted.setdefault(twin.why.kind, [])
        if len(quoted) < QUOTED:
            quoted.append({"id": source, "axis": twin.axis, "reason": twin.why.reason})

    def as_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "twins": dict(sorted(self.twins.items())),
            "abstained": dict(sorted(self.abstained.items())),
            "without_terms": self.untouched,
            "not_drawn": self.not_drawn,
        }

    def report(self) -> dict[str, Any]:
        changes = sorted(self.changes.items(), key=lambda item: (-item[1], item[0]))
        return {
            **self.as_json(),
            "changes": dict(changes),
            "abstained_examples": dict(sorted(self.quoted.items())),
        }


def augment(run: Run[WriteParams]) -> dict[str, Any]:
    """Run ``cf-augment write``; returns the summary."""
    params = run.params
    axes = make_axes(params)
    inputs = [describe_input("records", path) for path in run.inputs]
    inputs += [describe_input("lexicon", path) for path in params.lexicon]
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine, validate=validate)
    counts = Counts()
    with ExitStack() as stack:
        writer = stack.enter_context(open_writer(str(run.output)))
        kept = stack.enter_context(open_writer(params.abstained)) if params.abstained else None
        for located in reader.located():
            record = located.record
            counts.records += 1
            source = identity(record)
            if not _drawn(source, run.seed, params.probability):
                counts.not_drawn += 1
                if params.mode != "twins":
                    writer.write(record)
                continue
            try:
                made = list(twins(record, axes, source, run.seed, params.spans, count=bool(params.report)))
            except ValueError as exc:
                counts.records -= 1
                reader.refuse(located, f"field {params.spans!r}: {exc}")
                continue
            written = [t.record for t in made if t.record is not None]
            if params.mode == "augment" or (params.mode == "substitute" and not written):
                writer.write({"id": source, **record} if written else record)
            if params.mode == "substitute":
                written = [_in_place(t, record) for t in written[:1]]
            for other in written:
                writer.write(other)
            for twin in made:
                if twin.why is None:
                    counts.twins[twin.axis] += 1
                    if twin.changes:
                        counts.changes.update(twin.changes)
                    continue
                counts.abstain(twin, source)
                if kept is not None:
                    kept.write({**record, "twin_axis": twin.axis, "reason": twin.why.reason})
            counts.untouched += not made
    metrics = counts.as_json() | {"refused": reader.stats.refused}
    _finish(run, counts, metrics, inputs)
    return {"output": run.output, "metrics": metrics}


def _finish(run: Run[WriteParams], counts: Counts, metrics: dict[str, Any], inputs: list[Any]) -> None:
    if run.params.report:
        write_json(Path(run.params.report), counts.report())
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(
            run,
            Path(str(run.output)),
            inputs,
            metrics=metrics,
            licence=inputs[0].licence,
            source=inputs[0].source,
        )
    reasons = ", ".join(f"{kind} {n}" for kind, n in counts.abstained.most_common())
    run.log.info(
        "%d records, %d twins; %d abstentions%s; %d without a term",
        counts.records, counts.twins.total(), counts.abstained.total(), f" ({reasons})" if reasons else "",
        counts.untouched,
    )  # fmt: skip


def _drawn(source: str, seed: int, probability: float) -> bool:
    """The same records whatever their order: by a hash of seed and id."""
    if probability >= 1:
        return True
    digest = hashlib.sha256(f"draw:{seed}:{source}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < probability * 2.0**64


def _in_place(twin: Record, record: Record) -> Record:
    """A substitute keeps the id that the record had."""
    kept = {k: v for k, v in twin.items() if k != "id"}
    return {"id": record["id"], **kept} if "id" in record else kept
