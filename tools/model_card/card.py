"""The card: YAML head, sections, plots; and the artifact that holds them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import require
from tuneutils.tools.model_card import sections
from tuneutils.tools.model_card.facts import HUB, UNKNOWN, Facts, gather

if TYPE_CHECKING:
    from tuneutils.tools.model_card.cli import Params

#: SPDX identifiers → the Hub's own names, where lower case alone does not give them.
HUB_LICENCES = {
    "GPL-3.0-only": "gpl-3.0", "GPL-3.0-or-later": "gpl-3.0", "GPL-2.0-only": "gpl-2.0",
    "LGPL-3.0-only": "lgpl-3.0", "CC-BY-4.0": "cc-by-4.0", "CC-BY-SA-4.0": "cc-by-sa-4.0",
    "Apache-2.0": "apache-2.0", "MIT": "mit", "CC0-1.0": "cc0-1.0", "ISC": "isc", "MPL-2.0": "mpl-2.0",
    "BSD-3-Clause": "bsd-3-clause", "BSD-2-Clause": "bsd-2-clause",
    "GPL-3.0": "gpl-3.0", "GPL-2.0": "gpl-2.0",
}  # fmt: skip


def write_card(run: Run[Params]) -> Summary:
    """Gather the facts and write the card to the output, or its Markdown to stdout."""
    facts = gather(run.inputs[0], run.params.report)
    for node in facts.broken():
        run.log.warning("%s: %s", node.given.path, sections.STATES[node.state])
    if run.output == "-":
        sys.stdout.write(compose(facts, run.params, plots={}))
        return {"output": "-", "broken": len(facts.broken())}
    licence, source = facts.manifest.get("licence"), facts.manifest.get("source")
    inputs = [Input("artifact", facts.path, facts.sha256, facts.kind, licence, source)]
    inputs += [describe_input("report", path) for path in run.params.report]
    log = facts.training_log()
    if log or facts.reports:
        require("matplotlib", "plots")
    with run.artifact("card", inputs) as art:
        art.licence, art.source = licence, source
        art.metrics = {"broken_inputs": len(facts.broken()), "damaged_files": len(facts.damaged)}
        plots: dict[str, str] = {}
        if log or facts.reports:
            from tuneutils.tools.model_card.plots import draw

            plots = draw(facts, log, art.dir / "plots")
        (art.dir / "README.md").write_text(compose(facts, run.params, plots), encoding="utf-8")
    return {"output": run.output, "broken": len(facts.broken()), "plots": sorted(plots.values())}


def compose(facts: Facts, params: Params, plots: dict[str, str]) -> str:
    """The whole Markdown; ``plots`` maps a plot's name to its path in the card."""
    parts = [
        sections.opening(facts, params.title),
        sections.warnings(facts),
        sections.overview(facts),
        sections.base(facts),
        sections.data(facts),
        sections.parameters(facts),
        sections.results(facts, plots),
        sections.training(facts, plots),
        sections.use(facts),
        sections.lineage(facts),
        sections.licences(facts),
        sections.limits(facts, params.language),
        sections.reproduce(facts),
        sections.versions(facts),
    ]
    return head(facts, params) + "\n\n".join(part for part in parts if part) + "\n"


def head(facts: Facts, params: Params) -> str:
    """The Hub's YAML metadata: only keys whose value is known."""
    import yaml

    meta: dict[str, Any] = {}
    if params.language:
        meta["language"] = list(params.language)
    meta.update(_licence(facts))
    base = facts.base()
    if facts.kind in ("model", "adapter"):
        meta["library_name"] = "peft" if facts.kind == "adapter" else "transformers"
        meta["pipeline_tag"] = "text-generation"
        if base and (found := HUB.match(base.source)):
            meta["base_model"] = found["id"]
            if facts.kind == "adapter":
                meta["base_model_relation"] = "adapter"
    datasets = {m["id"] for _, n in facts.nodes() if n.is_data and (m := HUB.match(n.source))}
    if datasets:
        meta["datasets"] = sorted(datasets)
    method = facts.manifest.get("method")
    tags = ("tuneutils", facts.manifest.get("tool"), method)
    meta["tags"] = [str(tag) for tag in tags if tag]
    body = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{body}---\n\n"


def _licence(facts: Facts) -> dict[str, str]:
    """The Hub's ``license``: one name where there is one, ``other`` where several apply."""
    named = {licence for _, licence in facts.licences()}
    if named == {UNKNOWN}:
        return {"license": UNKNOWN}
    named.discard(UNKNOWN)
    if len(named) > 1:
        return {"license": "other", "license_name": "several-see-card"}
    one = named.pop()
    if one in HUB_LICENCES:
        return {"license": HUB_LICENCES[one]}
    return {"license": "other", "license_name": one}
