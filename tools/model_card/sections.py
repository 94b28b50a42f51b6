"""The card's sections, each from the facts alone; one that has nothing to say is empty."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import portable_path
from tuneutils.tools.model_card.facts import HUB, UNKNOWN, Facts, Node, known
from tuneutils.tools.model_card.loading import loading_code
from tuneutils.tools.model_card.markdown import code, fenced, link, number, size, table, text

STATES = {
    "unchanged": "unchanged since",
    "changed": "CHANGED since this was made from it",
    "gone": "GONE: not at this path any more",
    "remote": "outside source, by the hash of what was taken",
    "stdin": "standard input, not kept",
}
WHAT = {
    "adapter": "An adapter: small weights that are used together with their base model.",
    "model": "A language model in the Transformers format.",
    "records": "A record stream.",
    "report": "A measurement report.",
    "card": "A card of another artifact.",
}


def opening(facts: Facts, title: str | None) -> str:
    """Title and one sentence."""
    maker = f"{known(facts.manifest.get('tool'))} (tuneutils {known(facts.manifest.get('version'))})"
    what = WHAT.get(facts.kind, f"An artifact of kind {facts.kind}.")
    return f"# {text(title or facts.name)}\n\n{text(what)} Made by {code(maker)}."


def warnings(facts: Facts) -> str:
    """What is not as it was when the artifact was made."""
    lines = [
        f"- {code(line)}: this file of the artifact itself is not as its manifest has it"
        for line in facts.damaged
    ]
    lines += [
        f"- {code(node.given.path)} ({text(node.given.role)}): {STATES[node.state]}"
        for node in facts.broken()
    ]
    return "\n".join(["> **Broken lineage.** The following no longer hold:\n", *lines]) if lines else ""


def overview(facts: Facts) -> str:
    manifest = facts.manifest
    rows = [("Kind", text(facts.kind)), ("Path", code(facts.path)), ("SHA-256", code(facts.sha256))]
    for key, label in (("method", "Method"), ("dtype", "Computed in"), ("quantization", "Base stored in")):
        if manifest.get(key):
            rows.append((label, text(manifest[key])))
    if isinstance(manifest.get("model"), dict):
        rows += [(text(k).capitalize(), number(v)) for k, v in manifest["model"].items() if _plain(v)]
    rows.append(("Licence", text(known(manifest.get("licence")))))
    if manifest.get("source"):
        rows.append(("Source", source(str(manifest["source"]))))
    files = manifest.get("files", {})
    rows.append(("Size", f"{size(facts.bytes)} in {len(files)} {'file' if len(files) == 1 else 'files'}"))
    if "seed" in manifest:
        rows.append(("Seed", number(manifest["seed"])))
    return "## What it is\n\n" + table(["", ""], rows)


def source(given: str) -> str:
    """A link for a Hub source; anything else as it is written."""
    if found := HUB.match(given):
        at = f"/tree/{found['revision']}" if found["revision"] else ""
        return link(given, f"https://huggingface.co/{found['id']}{at}")
    return code(given)


def base(facts: Facts) -> str:
    node = facts.base()
    if node is None:
        return ""
    rows = [("Named as", code(node.given.path)), ("SHA-256", code(node.given.sha256))]
    rows.append(
        ("Source", source(node.source) if node.source != UNKNOWN else "unknown: no source is recorded")
    )
    rows += [("Licence", text(node.licence)), ("State", STATES[node.state])]
    facts_of = node.manifest.get("model")
    if isinstance(facts_of, dict):
        rows += [(text(k).capitalize(), number(v)) for k, v in facts_of.items() if _plain(v)]
    return "## Base model\n\n" + table(["", ""], rows)


def data(facts: Facts) -> str:
    """Every record stream of the lineage with hash, counts, licence and source."""
    rows = []
    for _, node in facts.nodes():
        if node.is_data:
            shown = source(node.source) if node.source != UNKNOWN else UNKNOWN
            counted = records(node)
            rows.append(
                [
                    text(node.given.role), code(node.given.path), counted, text(node.licence), shown,
                    code(node.given.sha256[:16] or "not hashed"), STATES[node.state],
                ]
            )  # fmt: skip
    unique = list(dict.fromkeys(map(tuple, rows)))
    if not unique:
        return ""
    head = ["used as", "path", "records", "licence", "source", "SHA-256 (first 16)", "state"]
    return "## Data\n\n" + table(head, unique)


def records(node: Node) -> str:
    """The number of records: from the stream's manifest, or counted while the stream is as it was."""
    metrics = node.manifest.get("metrics", {})
    for key in ("written", "records", "examples"):
        if isinstance(metrics.get(key), int):
            return number(metrics[key])
    path = Path(node.given.path)
    if node.state == "unchanged" and path.suffix in (".jsonl", ".ndjson"):
        with open(path, "rb") as stream:
            return number(sum(1 for line in stream if line.strip()))
    return UNKNOWN


def parameters(facts: Facts) -> str:
    rows = [
        (code(name), code(_shown(entry.get("value"))), text(entry.get("source", UNKNOWN)))
        for name, entry in facts.manifest.get("params", {}).items()
    ]
    return "## Parameters\n\n" + table(["parameter", "value", "from"], rows) if rows else ""


def _shown(value: Any) -> str:
    return (
        "not set"
        if value is None
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
    )


def results(facts: Facts, plots: Mapping[str, str]) -> str:
    parts = []
    own = list(_flat(facts.manifest.get("metrics", {})))
    if own:
        parts.append("From the artifact's own manifest:\n\n" + table(["metric", "value"], own))
    for path, manifest, report in facts.reports:
        parts.append(_report(facts, path, manifest, report))
    if "results" in plots:
        parts.append(f"![Values with their intervals]({plots['results']})")
    return "## Results\n\n" + "\n\n".join(parts) if parts else ""


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested metrics as dotted names; an estimate with its interval is one row."""
    for name, value in metrics.items():
        label = f"{prefix}{name}"
        if isinstance(value, dict) and "value" in value and not isinstance(value["value"], dict):
            yield code(label), _estimate(value)
        elif isinstance(value, dict):
            yield from _flat(value, f"{label}.")
        elif value is not None:
            yield code(label), number(value) if _plain(value) else code(json.dumps(value, ensure_ascii=False))


def _estimate(found: Mapping[str, Any]) -> str:
    shown = "not defined" if found["value"] is None else number(found["value"])
    if found.get("low") is not None and found.get("high") is not None:
        shown += f" \\[{number(found['low'])}, {number(found['high'])}\\]"
    return shown + (f" (n = {number(found['n'])})" if "n" in found else "")


def _report(facts: Facts, path: str, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    measured = {i["path"]: i["sha256"] for i in manifest.get("inputs", [])}
    rows = []
    for model in report["models"]:
        this = measured.get(model["info"].get("path")) == facts.sha256
        label = text(model["label"]) + (" **(this)**" if this else "")
        for task, metrics in model["results"].items():
            for name, found in metrics.items():
                difference = model.get("differences", {}).get(task, {}).get(name)
                rows.append(
                    [
                        label,
                        text(task),
                        text(name),
                        _estimate(found),
                        _estimate(difference) if difference else "",
                    ]
                )
    against = report.get("baseline")
    head = ["model", "task", "metric", "value", f"against {text(against)}" if against else ""]
    if not against:
        head, rows = head[:4], [row[:4] for row in rows]
    notes = [f"- {text(w)}" for w in report.get("warnings", [])]
    title = f"Measured by lm-bench in {code(path)}; intervals: {text(known(report.get('interval')))}."
    return "\n\n".join(part for part in (title, table(head, rows), "\n".join(notes)) if part)


def training(facts: Facts, plots: Mapping[str, str]) -> str:
    log = facts.training_log()
    losses = [e for e in log if e.get("loss") is not None]
    held = [e for e in log if e.get("eval_loss") is not None]
    if not losses and not held:
        return ""
    rows = []
    for label, key, found in (("training loss", "loss", losses), ("held-out loss", "eval_loss", held)):
        if found:
            low = min(found, key=lambda e: e[key])
            first, last = found[0], found[-1]
            rows.append(
                [
                    label,
                    *(f"{number(e[key])} (step {number(e['step'])})" for e in (first, last, low)),
                    str(len(found)),
                ]
            )
    parts = ["## Training", table(["", "first", "last", "lowest", "points"], rows)]
    if "training" in plots:
        parts.insert(1, f"![Loss and learning rate over steps]({plots['training']})")
    return "\n\n".join(parts)


def use(facts: Facts) -> str:
    """A code block that runs in the folder that paths are relative to."""
    lines = loading_code(facts)
    where = "Paths are relative to the folder in which the tools were run."
    return f"## How to load it\n\n{where}\n\n{fenced(lines, 'python')}"


def lineage(facts: Facts) -> str:
    if not facts.inputs:
        return "## Lineage\n\nNo inputs are recorded: it was made from parameters alone."
    tree = [f"{facts.path}  {facts.sha256[:12]}  {facts.kind}"]
    for depth, node in facts.nodes():
        licence = "" if node.licence == UNKNOWN else f"  {node.licence}"
        digest = node.given.sha256[:12] or "no hash"
        tree.append(
            f"{'  ' * depth}{node.given.role}: {node.given.path}  {digest}{licence}  ({STATES[node.state]})"
        )
    lines = [" ".join(line.split("\n")) for line in tree]
    return f"## Lineage\n\n{fenced(chr(10).join(lines), 'text')}\n\n{fenced(_mermaid(facts), 'mermaid')}"


def _mermaid(facts: Facts) -> str:
    lines = ["graph BT", f'  n0["{_label(facts.path)}<br>{_label(facts.kind)}"]']
    ids = {"": 0}

    def walk(nodes: Sequence[Node], parent: int) -> None:
        for node in nodes:
            key = f"{node.given.path}\n{node.given.sha256}"
            known_before = key in ids
            me = ids.setdefault(key, len(ids))
            if not known_before:
                state = "" if node.state in ("unchanged", "remote") else f"<br>{node.state}"
                lines.append(f'  n{me}["{_label(node.given.path)}<br>{_label(node.licence)}{state}"]')
            edge = f'  n{me} -->|"{_label(node.given.role)}"| n{parent}'
            if edge not in lines:
                lines.append(edge)
                walk(node.children, me)

    walk(facts.inputs, 0)
    return "\n".join(lines)


def _label(value: str) -> str:
    """A Mermaid label: its own escapes for what would end it or be markup."""
    out = " ".join(str(value).split())
    for mark, escape in (("#", "#35;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;"), ("`", "#96;")):
        out = out.replace(mark, escape)
    return out


def licences(facts: Facts) -> str:
    found = facts.licences()
    names = {licence for _, licence in found}
    if names == {UNKNOWN}:
        said = "No licence is recorded for any part: unknown."
    elif len(names - {UNKNOWN}) > 1:
        said = "Parts are under different licences, of which the most restrictive binds: see each."
    else:
        said = f"The licence recorded is {text((names - {UNKNOWN}).pop())}."
    if UNKNOWN in names and len(names) > 1:
        said += " For some parts none is recorded: unknown."
    return (
        "## Licences\n\n" + said + "\n\n" + table(["part", "licence"], [(code(p), text(n)) for p, n in found])
    )


def limits(facts: Facts, languages: Sequence[str]) -> str:
    """Limits that follow from the facts; what is not known is said to be unknown."""
    metrics = facts.manifest.get("metrics", {})
    lines = []
    if languages:
        lines.append(f"Languages, as named by the card's author: {', '.join(map(text, languages))}.")
    else:
        lines.append("Languages of the data: unknown, none is recorded.")
    if isinstance(metrics.get("examples"), int):
        tokens = (
            f" with {number(metrics['learnt_tokens'])} tokens learnt from"
            if "learnt_tokens" in metrics
            else ""
        )
        lines.append(
            f"Trained on {number(metrics['examples'])} examples{tokens}; nothing outside them was taught."
        )
    for key, said in (("truncated", "cut at the context length"), ("dropped", "left out")):
        if metrics.get(key):
            lines.append(f"{number(metrics[key])} training examples were {said}.")
    if facts.kind in ("model", "adapter"):
        tasks = sorted({t for _, _, r in facts.reports for t in r.get("tasks", {})})
        measured = ", ".join(code(t) for t in tasks)
        lines.append(
            f"Measured on {measured} only." if tasks else "No benchmark report was given for this card."
        )
        lines.append("No measurement of safety, bias or truthfulness is part of this card.")
    if scheme := facts.manifest.get("quantization"):
        lines.append(f"Trained over a base stored in {text(scheme)}; other precisions give other outputs.")
    if facts.broken() or facts.damaged:
        lines.append("The lineage is broken as said above: it cannot be made again from what is there now.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def reproduce(facts: Facts) -> str:
    """The commands, oldest input first, from the manifests."""
    steps: dict[str, None] = {}

    def walk(nodes: Sequence[Node]) -> None:
        for node in nodes:
            walk(node.children)
            if node.state == "unchanged" and node.manifest.get("tool"):
                steps.setdefault(command(node.manifest, _output(node)))

    walk(facts.inputs)
    if facts.manifest.get("tool"):
        steps.setdefault(command(facts.manifest, facts.path))
    note = "From the folder in which the tools were run, with the versions below:"
    return f"## Reproduce\n\n{note}\n\n{fenced(chr(10).join(steps), 'sh')}" if steps else ""


def _output(node: Node) -> str:
    """A folder artifact's own path when the input is one of its files."""
    path = Path(node.given.path)
    for parent in [path, *list(path.parents)[:2]]:
        if (parent / "artifact.json").is_file():
            return parent.as_posix()
    return node.given.path


def command(manifest: Mapping[str, Any], output: str) -> str:
    """The command line that makes an artifact, options at their defaults left out."""
    params = manifest.get("params", {})
    values = {portable_path(str(v)) for e in params.values() for v in _list(e.get("value"))}
    inputs = manifest.get("inputs", [])
    has_adapter = any(i["role"] == "adapter" for i in inputs)
    words = str(manifest["tool"]).split()
    for given in inputs:
        implied = has_adapter and given["role"] == "model"
        if given["path"] not in values and not implied:
            words.append(given["path"])
    for name, entry in params.items():
        if entry.get("source") == "default" or entry.get("value") is None:
            continue
        flag = "--" + name.replace("_", "-")
        for value in _list(entry["value"]):
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, str(value)]
    if manifest.get("seed"):
        words += ["--seed", str(manifest["seed"])]
    return shlex.join([*words, "-o", output])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def versions(facts: Facts) -> str:
    libraries = facts.manifest.get("libraries", {})
    rows = [("tuneutils", code(known(facts.manifest.get("version"))))]
    rows += [(text(name), code(version)) for name, version in libraries.items()]
    return "## Versions\n\n" + table(["library", "version"], rows)


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))
