"""Learn a sentence encoder from parallel records."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import Reader
from tuneutils.tools.xl_parallel.encoder import train
from tuneutils.tools.xl_parallel.params import EncoderParams


def learn(run: Run[EncoderParams]) -> dict[str, Any]:
    """Run ``xl-parallel encoder``; returns the summary."""
    inputs = [describe_input("pairs", path) for path in run.inputs]
    with run.artifact("sentence-encoder", inputs) as art:
        quarantine = art.work / "quarantine.jsonl" if run.on_error == "quarantine" else None
        reader = Reader(run.inputs, formats=("parallel",), on_error=run.on_error, quarantine=quarantine)
        records = [r for r in reader if r["src"].strip() and r["tgt"].strip()]
        src_langs, tgt_langs = {r["src_lang"] for r in records}, {r["tgt_lang"] for r in records}
        if both := src_langs & tgt_langs:
            raise ToolError(
                f"{', '.join(sorted(both))} is on both sides; an encoder has each language on one: "
                "train one encoder a pair of languages, or make one language the source of all"
            )
        made = train(
            [r["src"] for r in records],
            [r["tgt"] for r in records],
            sorted(src_langs),
            sorted(tgt_langs),
            dim=run.params.dim,
            features=run.params.features,
            seed=run.seed,
        )
        made.save(art.dir)
        art.licence = inputs[0].licence
        art.metrics = {
            "pairs": made.pairs, "dim": made.dim, "refused": reader.stats.refused,
            "features": {"src": len(made.src.hashes), "tgt": len(made.tgt.hashes)},
        }  # fmt: skip
    run.log.info(
        "%d pairs, %d dimensions: %s to %s", made.pairs, made.dim, ", ".join(made.src.languages),
        ", ".join(made.tgt.languages),
    )  # fmt: skip
    return {"output": run.output, "metrics": art.metrics}
