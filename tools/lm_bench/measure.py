"""Measure one model: per-item scores on record streams, task files and prompts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.evaluate_model import (
    context_length,
    continuation_scores,
    perplexity_items,
    pick,
    record_sequence,
    text_sequence,
)
from tuneutils.shared.models import Loaded, ModelRef, load_model, parameter_counts
from tuneutils.shared.records import BadRecord, Located, Reader, dump_line, format_of
from tuneutils.tools.lm_bench import fidelity
from tuneutils.tools.lm_bench.edge import EdgeModel, is_edge
from tuneutils.tools.lm_bench.generation import answer_task, check_answers
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.metrics import KINDS, Item
from tuneutils.tools.lm_bench.params import Params
from tuneutils.tools.lm_bench.tasks import Task, load_task

FORMATS = ("text", "prompt-completion", "messages")


@dataclass(frozen=True)
class Exam:
    """One named set of items, the same for every model.

    Attributes:
        kind: a key of ``metrics.KINDS``.
        source: located records, or a task.
        metrics: names of what is reported, the headline first.
        settings: all that decides the numbers besides the model.
    """

    name: str
    kind: str
    source: list[Located] | Task
    metrics: tuple[str, ...]
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "metrics": list(self.metrics), "settings": self.settings}


def prepare(run: Run[Params]) -> tuple[list[Exam], list[Input]]:
    """Read and check everything that is asked, before any model is loaded.

    Returns:
        The exams, and the files as inputs of the manifest.
    """
    params = run.params
    exams: list[Exam] = []
    inputs: list[Input] = []
    for given in params.records:
        name, path = split_name(given)
        inputs.append(describe_input("records", path))
        exams.append(_stream_exam(run, name, path))
    if params.general:
        inputs.append(describe_input("general", params.general))
        exams.append(_stream_exam(run, "general", params.general))
    if params.generate:
        exams.append(_generation_exam(params, [e for e in exams if e.name != "general"]))
    if params.engine == "own":
        for given in params.task:
            task = load_task(given, num_fewshot=params.num_fewshot, limit=params.limit)
            inputs += [describe_input("task", given), *(describe_input("data", p) for p in task.data_files)]
            exams.append(_task_exam(params, task))
    elif params.task:
        from tuneutils.tools.lm_bench.harness import harness_inputs

        inputs += harness_inputs(run)
    names = [e.name for e in exams]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise ToolError(f"two sets are called {twice!r}; name them with NAME=FILE", code=ExitCode.USAGE)
    return exams, inputs


def split_name(given: str) -> tuple[str, str]:
    """``NAME=PATH`` in its parts; the name of a bare path is its stem, or its folder's name."""
    if "=" in given and not Path(given).exists():
        name, _, path = given.partition("=")
        return name, path
    return Path(given).resolve().name.split(".")[0], given


def _stream_exam(run: Run[Params], name: str, path: str) -> Exam:
    params = run.params
    reader = Reader([path], formats=FORMATS, on_error=run.on_error, quarantine=_quarantine(run, name))
    records = list(reader.located())[: params.limit]
    settings = {
        "sha256": _hash([dump_line(r.record) for r in records]),
        "max_length": params.max_length,
        "stride": params.stride or params.max_length,
        "template": params.template,
    }
    return Exam(name, "text", records, KINDS["text"], settings)


def _quarantine(run: Run[Params], name: str) -> Path | None:
    if run.output is None:
        return None
    return Path(run.output).with_name(f"{Path(run.output).name}.{name}.rejected.jsonl")


def _generation_exam(params: Params, streams: Sequence[Exam]) -> Exam:
    with_prompt = [r for e in streams for r in e.source if format_of(r.record) != "text"]  # type: ignore[union-attr]
    if not with_prompt:
        raise ToolError("--generate: no record of --records has a prompt", code=ExitCode.USAGE)
    chosen = with_prompt[: params.generate]
    settings = {
        "sha256": _hash([dump_line(r.record) for r in chosen]),
        "max_new_tokens": params.max_new_tokens,
        "template": params.template,
        "answer_pattern": params.answer_pattern,
    }
    return Exam("generation", "generation", chosen, KINDS["generation"], settings)


def _task_exam(params: Params, task: Task) -> Exam:
    wanted = [str(m["metric"]) for m in task.metrics]
    metrics = wanted + [m for m in ("stop_rate", "length") if task.output_type == "generate_until"]
    contexts = task.contexts() if task.output_type != "loglikelihood_rolling" else []
    asked = [json.dumps([d, c], sort_keys=True, default=str).encode() for d, c in _zip(task.docs, contexts)]
    settings = {
        "sha256": _hash(asked),
        "engine": "own",
        "output_type": task.output_type,
        "num_fewshot": int(task.config.get("num_fewshot") or 0),
        "max_length": params.max_length,
    }
    return Exam(task.name, task.output_type, task, tuple(metrics), settings)


def _zip(docs: Sequence[Any], contexts: Sequence[str]) -> list[tuple[Any, str]]:
    return list(zip(docs, contexts or [""] * len(docs), strict=True))


def _hash(lines: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(lines)).hexdigest()


def measure(
    run: Run[Params],
    label: str,
    ref: ModelRef,
    exams: Sequence[Exam],
    original: fidelity.Original | None = None,
) -> Measured:
    """Load a model and put it through all exams.

    Args:
        original: the model of ``--reference``.

    Raises:
        ToolError: naming the model.
    """
    params = run.params
    loaded: Loaded | EdgeModel
    try:
        if is_edge(ref.given):
            loaded = EdgeModel.start(ref.given)
            measured = Measured(label, loaded.describe())
        else:
            loaded = load_model(
                ref.given, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
            )
            measured = Measured(label, describe_model(ref, loaded))
        for exam in exams:
            run.log.info("%s: %s, %d items", label, exam.name, _size(exam))
            items = _examine(run, loaded, exam)
            _check_finite(items, exam.name)
            _add_clusters(items, exam, params.cluster)
            measured.exams[exam.name] = exam.as_json()
            measured.items[exam.name] = items
        if original is not None and original.label != label:
            run.log.info("%s: against %s", label, original.label)
            fidelity.add(run, measured, loaded, original, exams)
        if isinstance(loaded, EdgeModel):
            loaded.close()
        elif params.engine == "harness" and params.task:
            from tuneutils.tools.lm_bench.harness import run_harness

            run_harness(run, loaded, measured)
    except ToolError as exc:
        if ref.given in str(exc) or label in str(exc):
            raise
        raise ToolError(f"{label} ({ref.given}): {exc}", code=exc.code) from exc
    return measured


def _size(exam: Exam) -> int:
    return len(exam.source.docs if isinstance(exam.source, Task) else exam.source)


def describe_model(ref: ModelRef, loaded: Loaded) -> dict[str, Any]:
    """Parameters, bytes on disk and precision of a loaded model."""
    metrics = ref.manifest.get("metrics", {})
    trainable = metrics.get("trainable_parameters")
    if trainable is None and ref.kind == "adapter":
        trainable = _stored_parameters(Path(ref.path))
    return {
        "path": ref.given,
        "kind": ref.kind,
        "method": ref.manifest.get("method"),
        "base": ref.root.given if ref.base else None,
        "trainable_parameters": trainable,
        "total_parameters": parameter_counts(loaded.model)["total"],
        "bytes": _bytes_on_disk(ref),
        "bits_per_weight": _bits_per_weight(ref, parameter_counts(loaded.model)["total"]),
        "base_bytes": _bytes_on_disk(ref.root) if ref.base else None,
        "dtype": dtype_name(loaded.dtype),
        "quantization": ref.quantization,
    }


def _stored_parameters(folder: Path) -> int:
    """Parameters in an adapter's files, read from their headers."""
    from safetensors import safe_open

    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return total


def _bits_per_weight(ref: ModelRef, parameters: int) -> float | None:
    """Of the stored weights, scales included; None for an adapter or a model on the Hub."""
    path = Path(ref.path)
    if ref.kind == "gguf":
        return float(f"{8 * path.stat().st_size / parameters:.6g}")
    files = sorted(path.glob("*.safetensors")) if ref.kind == "folder" else []
    return float(f"{8 * sum(map(_stored_bytes, files)) / parameters:.6g}") if files else None


def _stored_bytes(path: Path) -> int:
    """Of a safetensors file's tensors: all but the header, whose length is in the first eight bytes."""
    with open(path, "rb") as stream:
        return path.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def _bytes_on_disk(ref: ModelRef) -> int | None:
    path = Path(ref.path)
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else None


def _examine(run: Run[Params], loaded: Loaded | EdgeModel, exam: Exam) -> list[Item]:
    if isinstance(exam.source, Task):
        return run_task(run.params, loaded, exam.source)
    if exam.kind == "generation":
        return check_answers(run, loaded, exam.source)
    sequences = []
    for located in exam.source:
        try:
            sequences.append(record_sequence(located.record, loaded.tokenizer, run.params.template))
        except ValueError as exc:
            raise BadRecord(located.place, str(exc)) from exc
    limits = _limits(run.params, loaded)
    with run.progress(None, exam.name, "windows") as bar:
        return perplexity_items(loaded, sequences, progress=bar.update, **limits)


def _limits(params: Params, loaded: Loaded | EdgeModel, *, with_stride: bool = True) -> dict[str, Any]:
    own = context_length(loaded.model)
    longest = params.max_length if own is None else min(params.max_length, own - 1)
    stride = {"stride": min(params.stride or longest, longest)} if with_stride else {}
    return {"max_length": longest, "batch_tokens": params.batch_tokens, **stride}


def run_task(params: Params, loaded: Loaded | EdgeModel, task: Task) -> list[Item]:
    try:
        if task.output_type == "loglikelihood_rolling":
            return _rolling(params, loaded, task)
        if task.output_type == "generate_until":
            return answer_task(loaded, task, _limits(params, loaded)["max_length"])
        if task.output_type == "loglikelihood":
            return _loglikelihood(params, loaded, task)
        return _multiple_choice(params, loaded, task)
    except ValueError as exc:
        raise ToolError(f"{task.path}: {exc}") from exc


def _rolling(params: Params, loaded: Loaded | EdgeModel, task: Task) -> list[Item]:
    texts = [str(task.target(doc)) for doc in task.docs]
    sequences = [(text_sequence(t, loaded.tokenizer), len(t.encode())) for t in texts]
    items: list[Item] = list(perplexity_items(loaded, sequences, **_limits(params, loaded)))
    for item, text in zip(items, texts, strict=True):
        item["words"] = len(text.split())
    return items


def _loglikelihood(params: Params, loaded: Loaded | EdgeModel, task: Task) -> list[Item]:
    delimiter = task.config_text("target_delimiter")
    pairs = [
        (context, f"{delimiter}{task.target(doc)}")
        for context, doc in zip(task.contexts(), task.docs, strict=True)
    ]
    scores = continuation_scores(loaded, pairs, greedy=True, **_limits(params, loaded, with_stride=False))
    return [{"acc": int(s.greedy), "nll": -s.logprob, "tokens": s.tokens} for s in scores]


def _multiple_choice(params: Params, loaded: Loaded | EdgeModel, task: Task) -> list[Item]:
    delimiter = task.config_text("target_delimiter")
    choices = [task.choices(doc) for doc in task.docs]
    contexts = task.contexts()
    pairs = [(c, delimiter + choice) for c, options in zip(contexts, choices) for choice in options]
    scores = iter(continuation_scores(loaded, pairs, **_limits(params, loaded, with_stride=False)))
    items: list[Item] = []
    for doc, options in zip(task.docs, choices, strict=True):
        logprobs = [next(scores).logprob for _ in options]
        gold, picked = task.gold(doc), pick(logprobs, options)
        hits = {name: int(choice in gold) for name, choice in picked.items()}
        items.append({**hits, "gold": gold, "logprobs": logprobs})
    return items


def _check_finite(items: Sequence[Item], name: str) -> None:
    for i, item in enumerate(items):
        values = [item.get("nll", 0.0), *item.get("logprobs", [])]
        if not all(math.isfinite(v) for v in values):
            raise ToolError(f"{name}, item {i}: the log-likelihood is not finite; the weights are broken")


def _add_clusters(items: Sequence[Item], exam: Exam, name: str | None) -> None:
    if name is None:
        return
    docs = exam.source.docs if isinstance(exam.source, Task) else [r.record for r in exam.source]
    for i, (item, doc) in enumerate(zip(items, docs, strict=True)):
        item["cluster"] = str(doc.get(name, f"item {i}"))
