"""What a fusion learnt: the weights of its layers by domain, and its loss beside what it is made from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Input, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.examples import encode_all
from tuneutils.shared.models import context_length, load_model, load_tokenizer, model_input, resolve
from tuneutils.shared.record_source import open_source
from tuneutils.shared.supervise import LEARNABLE
from tuneutils.tools.adapter_fuse.params import ReportParams


def report(run: Run[ReportParams]) -> dict[str, Any]:
    """Run ``adapter-fuse report``; returns the summary.

    Raises:
        ToolError: no fusion, no record, or another model of another tokenizer.
    """
    require("matplotlib", "plots")
    params = run.params
    ref = resolve(params.model)
    names = ref.manifest.get("adapters")
    if not str(ref.manifest.get("method", "")).startswith("fusion-") or not names:
        raise ToolError(
            f"{params.model}: is no fusion; make one with adapter-fuse train", code=ExitCode.USAGE
        )
    sources = {path: open_source(run, [path], "records", formats=LEARNABLE) for path in run.inputs}
    inputs: list[Input] = [model_input(params.model)]
    inputs += [model_input(other, "against") for other in params.against]
    inputs += [i for source in sources.values() for i in source.inputs]
    with run.artifact("report", inputs) as art:
        tokenizer = load_tokenizer(ref)
        domains = _domains(run, sources, tokenizer, context_length(ref))
        made = _measure(run, domains, names)
        write_json(art.dir / "report.json", made)
        (art.dir / "report.md").write_text(as_text(made), encoding="utf-8")
        from tuneutils.tools.adapter_fuse.plot import draw

        draw(made, art.dir / "attention.png")
        art.metrics["domains"] = {
            domain: {way: row["loss"]["value"] for way, row in found["ways"].items()}
            for domain, found in made["domains"].items()
        }
    return {"output": run.output, "metrics": art.metrics}


def _domains(
    run: Run[ReportParams], sources: Mapping[str, Any], tokenizer: Any, context: int | None
) -> dict[str, list[Any]]:
    """Encoded records by domain: the value of the field that names it, else the file's name."""
    made: dict[str, list[Any]] = {}
    for path, source in sources.items():
        stem = re.sub(r"\.(jsonl|parquet)(\.\w+)?$", "", Path(path).name)
        by_domain: dict[str, list[Any]] = {}
        for item in source.located:
            domain = str(item.record.get(run.params.domain_field) or stem)
            by_domain.setdefault(domain, []).append(item)
        for domain, located in by_domain.items():
            source.located = located
            made.setdefault(domain, []).extend(encode_all(run, source, tokenizer, context).encoded)
    return dict(sorted(made.items()))


def _measure(run: Run[ReportParams], domains: dict[str, list[Any]], names: list[str]) -> dict[str, Any]:
    from tuneutils.tools.adapter_fuse.measure import attention, compare, score_domains, ways

    params = run.params
    loaded = load_model(params.model, device=run.device, dtype=run.dtype)
    count = sum(map(len, domains.values()))
    measured = ways(loaded.model, names)
    bar = run.progress(count * (len(measured) + len(params.against)), "scoring", "records")
    scores = {}
    with bar:
        weights = attention(loaded, domains, len(names))
        for way, meanwhile in measured.items():
            with meanwhile:
                scores[way] = score_domains(loaded, domains, bar.update)
        vocabulary = loaded.tokenizer.get_vocab()
        for other in params.against:
            loaded = load_model(other, device=run.device, dtype=run.dtype)
            if loaded.tokenizer.get_vocab() != vocabulary:
                raise ToolError(f"{other}: has another vocabulary, so losses a token cannot be compared")
            scores[other] = score_domains(loaded, domains, bar.update)
    found = compare(scores, names, run.seed)
    for domain, places in weights.items():
        found[domain]["records"] = len(domains[domain])
        found[domain]["layers"] = by_layer(places)
        found[domain]["places"] = {place: w.tolist() for place, w in places.items()}
    return {"schema": 1, "adapters": names, "domains": found}


def by_layer(places: Mapping[str, Iterable[float]]) -> list[list[float]]:
    """The mean weights of each layer's places, ``(layers, N)``: a layer may have several (LoRAs)."""
    layers: dict[int, list[list[float]]] = {}
    for place, weights in places.items():
        index = re.search(r"\.(\d+)(?:\.|$)", place)
        layers.setdefault(int(index[1]) if index else -1, []).append(list(weights))
    return [
        [sum(column) / len(rows) for column in zip(*rows, strict=True)] for _, rows in sorted(layers.items())
    ]


def as_text(made: Mapping[str, Any]) -> str:
    """A table for people: each domain's loss by every way, with intervals and differences."""
    lines = [
        "# Fusion by domain",
        "",
        "Loss in nats a token; negative differences mean that fusion is better.",
        "",
    ]
    for domain, found in made["domains"].items():
        lines += [f"## {domain}: {found['records']} records, {found['tokens']} tokens", ""]
        lines += ["| | loss | 95 % | fused minus it | 95 % |", "|---|---|---|---|---|"]
        for way, row in found["ways"].items():
            name = f"**{way}**" if way == f"only {found['best_single']}" else way
            difference = _estimate(row["fused_minus"], "+") if "fused_minus" in row else " | "
            lines.append(f"| {name} | {_estimate(row['loss'])} | {difference} |")
        lines += ["", verdict(found), ""]
    return "\n".join(lines)


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the fusion is better than the best single adapter, as far as these records tell."""
    best = found["best_single"]
    difference = found["ways"][f"only {best}"]["fused_minus"]
    if difference["low"] is None:
        return f"One record cannot tell the fusion from the best adapter, {best}."
    if difference["high"] < 0:
        return f"The fusion is better than the best adapter, {best}."
    if difference["low"] > 0:
        return f"The fusion is worse than the best adapter, {best}."
    return f"These records do not tell the fusion from the best adapter, {best}."


def _estimate(found: Mapping[str, Any], sign: str = "") -> str:
    if found["low"] is None:
        return f"{found['value']:{sign}.4f} | "
    return f"{found['value']:{sign}.4f} | {found['low']:{sign}.4f} to {found['high']:{sign}.4f}"
