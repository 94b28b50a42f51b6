"""Pairs divided into streams, so that no sentence, nor a near-copy, of either language is in two."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Reader, open_writer
from tuneutils.tools.xl_parallel.copies import Groups, join_copies
from tuneutils.tools.xl_parallel.params_pairs import SplitParams


def split(run: Run[SplitParams]) -> dict[str, Any]:
    """Run ``xl-parallel split``; returns the summary."""
    shares = parse_shares(run.params.split)
    inputs = [describe_input("pairs", path) for path in run.inputs]
    with run.artifact("records", inputs) as art:
        quarantine = art.work / "quarantine.jsonl" if run.on_error == "quarantine" else None
        reader = Reader(run.inputs, formats=("parallel",), on_error=run.on_error, quarantine=quarantine)
        records = list(reader)
        groups = grouped([(r["src"], r["tgt"]) for r in records], run.params.near_copies)
        names = assign([f"{r['src']}\t{r['tgt']}" for r in records], groups, shares, run.seed)
        counts: Counter[str] = Counter(names)
        if empty := [name for name in shares if not counts[name]]:
            raise ToolError(
                f"nothing left for {', '.join(empty)}: {len(records)} pairs make {len(set(groups))} groups "
                f"of sentences that go together, the largest of {max(Counter(groups).values())}; "
                "raise --near-copies or its share"
            )
        for name in shares:
            with open_writer(art.dir / f"{name}.jsonl") as writer:
                for record, where in zip(records, names):
                    if where == name:
                        writer.write(record)
        art.licence, art.source = inputs[0].licence, inputs[0].source
        art.metrics = {
            "pairs": {name: counts[name] for name in shares}, "groups": len(set(groups)),
            "largest_group": max(Counter(groups).values()), "refused": reader.stats.refused,
        }  # fmt: skip
    run.log.info(
        "%s; %d groups, the largest of %d", ", ".join(f"{name} {counts[name]}" for name in shares),
        art.metrics["groups"], art.metrics["largest_group"],
    )  # fmt: skip
    return {"output": run.output, "metrics": art.metrics}


def parse_shares(text: str) -> dict[str, float]:
    """``train=0.9,test=0.1``.

    Raises:
        ToolError: it cannot be parsed, a name comes twice, or the shares do not sum to 1 (2).
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, mark, share = part.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        plain = name.replace("-", "").replace("_", "").isalnum()
        if not mark or not plain or name in shares or not 0 < value <= 1:
            raise ToolError(
                f"--split {part!r}: write NAME=SHARE,... with shares above 0", code=ExitCode.USAGE
            )
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ToolError(f"--split {text}: the shares sum to {sum(shares.values()):g}", code=ExitCode.USAGE)
    return shares


def grouped(pairs: Sequence[tuple[str, str]], threshold: float) -> list[int]:
    """A number for each pair; pairs linked by a shared or similar sentence of either side have the same."""
    owners = Groups(len(pairs))
    for side in (0, 1):
        join_copies([pair[side] for pair in pairs], owners, threshold)
    return [owners.find(i) for i in range(len(pairs))]


def assign(keys: Sequence[str], groups: Sequence[int], shares: dict[str, float], seed: int) -> list[str]:
    """Each pair's stream: whole groups, in the order of a hash, into the smaller streams until they are full.

    A group that would overfill a stream is left for the largest one, which gets all the rest.

    Args:
        keys: what each pair is; the order of the pairs does not matter.
    """
    sizes = Counter(groups)
    smallest: dict[int, str] = {}
    for key, group in zip(keys, groups):
        smallest[group] = min(key, smallest.get(group, key))
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}:{smallest[g]}".encode()).digest())
    ascending = sorted(shares, key=lambda name: (shares[name], name))
    room = {name: round(shares[name] * len(keys)) for name in ascending[:-1]}
    of_group: dict[int, str] = {}
    for group in order:
        fitting = (name for name in ascending[:-1] if sizes[group] <= room[name])
        name = next(fitting, ascending[-1])
        if name in room:
            room[name] -= sizes[group]
        of_group[group] = name
    return [of_group[g] for g in groups]
