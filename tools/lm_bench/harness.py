"""``--engine harness``: tasks run by lm-evaluation-harness, their per-item scores taken over.

The estimates and intervals are then ours, from items, as for every other task.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.artifact import Input, describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, nearest, require
from tuneutils.shared.evaluate_model import context_length
from tuneutils.shared.models import Loaded
from tuneutils.tools.lm_bench.measured import Measured
from tuneutils.tools.lm_bench.metrics import KINDS, Item
from tuneutils.tools.lm_bench.params import Params
from tuneutils.tools.lm_bench.tasks import data_files

#: Per-item pairs (log-likelihood, size) and the item field of the size.
SIZES = {"word_perplexity": "words", "byte_perplexity": "bytes", "bits_per_byte": "bytes"}


def harness_inputs(run: Run[Params]) -> list[Input]:
    """The task files among ``--task`` as inputs of the manifest; names belong to the package's version."""
    require("lm_eval", "harness")
    return [describe_input("task", given) for given in run.params.task if Path(given).is_file()]


def run_harness(run: Run[Params], loaded: Loaded, measured: Measured) -> None:
    """Put a loaded model through ``--task`` and add exams and items to ``measured``.

    Raises:
        ToolError: an unknown task, or data that cannot be had.
    """
    require("lm_eval", "harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    params = run.params
    own = context_length(loaded.model)
    longest = params.max_length if own is None else min(params.max_length, own - 1)
    lm = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend="causal",
        max_length=longest,
        batch_size=max(1, params.batch_tokens // 512),
    )
    manager = TaskManager()
    found = simple_evaluate(
        model=lm,
        tasks=[_task(given, manager) for given in params.task],
        num_fewshot=params.num_fewshot,
        limit=params.limit,
        bootstrap_iters=0,
        task_manager=manager,
    )
    for name, samples in sorted(found["samples"].items()):
        config = found["configs"][name]
        exam, items = _convert(run, name, config, samples)
        exam["settings"].update(max_length=params.max_length, engine=f"lm-eval {version('lm-eval')}")
        measured.exams[name], measured.items[name] = exam, items


def _task(given: str, manager: Any) -> str | dict[str, Any]:
    """A task's name, or a file's keys with its data files made absolute."""
    path = Path(given)
    if not path.is_file():
        if given not in manager.all_tasks:
            raise ToolError(
                f"--task {given}: neither a file nor a task of lm-evaluation-harness"
                f"{nearest(given, manager.all_tasks)}",
                code=ExitCode.USAGE,
            )
        return given
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = dict(load_yaml(path))
    config.setdefault("task", path.stem)
    if (config.get("dataset_kwargs") or {}).get("data_files"):
        files = {k: [str(p.absolute()) for p in v] for k, v in data_files(path, config).items()}
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": files}
    return config


def _convert(
    run: Run[Params], name: str, config: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[Item]]:
    """The harness's samples of one task as an exam and items; one item a document."""
    kind = str(config.get("output_type"))
    several = len({s["filter"] for s in samples}) > 1
    items: dict[int, Item] = {}
    names: dict[str, None] = {}
    hashes = []
    for sample in samples:
        item = items.setdefault(int(sample["doc_id"]), {})
        hashes.append(f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}".encode())
        if kind == "multiple_choice":
            item["logprobs"] = [float(r[0][0]) for r in sample["resps"]]
        elif kind == "generate_until":
            item["text"] = sample["resps"][0][0]
        for metric in sample["metrics"]:
            shown = f"{metric},{sample['filter']}" if several else metric
            if _add(item, kind, metric, shown, sample[metric]):
                names[shown] = None
            else:
                run.log.warning("%s: %s is no mean over items; left out", name, metric)
    known = KINDS.get(kind, ())
    ordered = sorted(names, key=lambda n: known.index(n) if n in known else len(known))
    settings = {
        "sha256": hashlib.sha256(b"\n".join(hashes)).hexdigest(),
        "output_type": kind,
        "num_fewshot": config.get("num_fewshot") or 0,
        "version": json.dumps((config.get("metadata") or {}).get("version")),
    }
    return {"kind": kind, "metrics": ordered, "settings": settings}, [items[i] for i in sorted(items)]


def _add(item: Item, kind: str, metric: str, shown: str, value: Any) -> bool:
    """Put a metric's per-item value into our fields; False for what is not additive over items."""
    if metric in SIZES:
        item["nll"], item[SIZES[metric]] = -float(value[0]), int(value[1])
        return True
    if kind == "loglikelihood" and metric == "perplexity":
        item["nll"] = -float(value)
        return True
    if isinstance(value, (bool, int, float)) or getattr(value, "ndim", None) == 0:
        item[shown] = float(value)
        return True
    return False
