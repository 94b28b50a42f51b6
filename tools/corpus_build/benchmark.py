"""A benchmark of a domain as task files of lm-evaluation-harness, with a sample for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.evaluate import ratio_estimate
from tuneutils.shared.records import Reader, write
from tuneutils.tools.corpus_build.items import CHOICES, Item, Maker, spread, without_leaks
from tuneutils.tools.corpus_build.params import BenchmarkParams
from tuneutils.tools.corpus_build.vocabulary import Vocabulary, log_odds, lower_counts

SHOWN = 20

#: What both task files have in common; ``task`` and the rest are filled in.
_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
target_delimiter: " "
{answer}
metric_list:
{metrics}
metadata:
  version: 1.0
"""
_CHOICE = 'doc_to_choice: "{{endings}}"\ndoc_to_target: "{{answer}}"'
_CLOZE = 'doc_to_target: "{{word}}"'
_METRIC = "  - {{metric: {}, aggregation: {}, higher_is_better: {}}}"


def make(run: Run[BenchmarkParams]) -> Summary:
    """Items from the held-out documents of a corpus.

    Raises:
        ToolError: no corpus (66), or one too small to ask about (65).
    """
    params = run.params
    corpus = Path(run.inputs[0])
    for side in ("train", "heldout"):
        if not (corpus / f"{side}.jsonl").is_file():
            raise ToolError(
                f"{corpus}: no {side}.jsonl; make a corpus first: corpus-build FOLDER -o {corpus}",
                code=ExitCode.MISSING_INPUT,
            )
    inputs = [describe_input("corpus", corpus), *(describe_input("general", path) for path in params.general)]
    with run.artifact("benchmark", inputs) as art:
        vocabulary = Vocabulary.of(_texts(corpus / "train.jsonl"))
        maker = Maker(vocabulary, _own_words(run, vocabulary), run.seed)
        candidates = [
            item for record in Reader([corpus / "heldout.jsonl"]) for item in maker.candidates(record)
        ]
        clean, leaked = without_leaks(candidates, _texts(corpus / "train.jsonl"))
        items = spread(clean, params.items, params.per_document, run.seed)
        if not items:
            raise ToolError(
                f"{corpus}: no question can be made of {len(candidates)} held-out sentences; hold out more "
                "(--heldout), or build from more text"
            )
        _write(art.dir, items, params.name)
        art.licence = inputs[0].licence
        art.metrics = {
            "items": len(items),
            "documents": len({i.source.get("id") for i in items}),
            "candidates": len(candidates),
            "leaked": leaked,
            "chance": 1 / CHOICES,
            "most_frequent_choice": _most_frequent(items, vocabulary),
        }
    frequent = art.metrics["most_frequent_choice"]["value"]
    run.log.info("%d items of %d documents", len(items), art.metrics["documents"])
    run.log.info("%d of %d candidates left out as leaks", leaked, len(candidates))
    run.log.info("the most frequent choice is right in %.3f, chance is %.3f", frequent, 1 / CHOICES)
    return {"output": run.output, **art.metrics}


def _texts(path: Path) -> Iterator[str]:
    for record in Reader([path]):
        yield record["text"]


def _own_words(run: Run[BenchmarkParams], vocabulary: Vocabulary) -> set[str] | None:
    """With general text, the words that are the domain's by a z-score of 1.96 and more."""
    if not run.params.general:
        return None
    domain = {}
    for word, count in vocabulary.count.items():
        domain[word.lower()] = domain.get(word.lower(), 0) + count
    general = lower_counts(str(record.get("text", "")) for record in Reader(list(run.params.general)))
    return {word for word, z in log_odds(domain, general) if z >= 1.96}


def _most_frequent(items: list[Item], vocabulary: Vocabulary) -> dict[str, Any]:
    """Accuracy of always taking the most frequent choice: near chance where the choices are fair."""
    right = [float(max(item.choices, key=lambda c: (vocabulary.count[c], c)) == item.word) for item in items]
    return ratio_estimate(right, clusters=[str(i.source.get("id")) for i in items]).as_json()


def _write(folder: Path, items: list[Item], name: str) -> None:
    write(folder / "items.jsonl", (item.as_record() for item in items))
    choice = [_METRIC.format(metric, "mean", "true") for metric in ("acc", "acc_norm")]
    cloze = [_METRIC.format("perplexity", "perplexity", "false"), _METRIC.format("acc", "mean", "true")]
    for task, kind, answer, metrics in (
        ("choice", "multiple_choice", _CHOICE, choice),
        ("cloze", "loglikelihood", _CLOZE, cloze),
    ):
        text = _TASK.format(
            name=f"{name}_{task}", data="items.jsonl", kind=kind, answer=answer, metrics="\n".join(metrics)
        )
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    (folder / "sample.md").write_text(_sample(items[:SHOWN]), encoding="utf-8")


def _sample(items: list[Item]) -> str:
    lines = [
        "# Sample of the items",
        "",
        "Each hides a word of a held-out sentence; the right one is in bold.",
        "",
    ]
    for number, item in enumerate(items, 1):
        shown = ", ".join(f"**{c}**" if i == item.answer else c for i, c in enumerate(item.choices))
        source = json.dumps(item.source, ensure_ascii=False)
        lines += [
            f"{number}. {item.context} ____ {item.rest}",
            f"   Choices: {shown}",
            f"   Source: `{source}`",
            "",
        ]
    return "\n".join(lines)
