"""Our engine against lm-evaluation-harness, item by item, on the same task files."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PROVERBS, Result

sys.path.insert(0, str(Path(__file__).parent))
from task_files import write_choice_task, write_task

pytestmark = pytest.mark.slow
pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'tuneutils[harness]'"
)


def items(folder: str) -> list[dict[str, Any]]:
    with gzip.open(Path(folder) / "items.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture
def both(tiny_model: Path, workdir: Path, cli: Callable[..., Result]) -> Callable[..., tuple[Any, Any]]:
    """``both(task, *options)``: the items and results of our engine and of the harness."""

    def call(task: Path, *options: str) -> tuple[Any, Any]:
        out = []
        for engine in ("own", "harness"):
            args = (tiny_model, "--task", task, "--engine", engine, "--dtype", "float32", "--device", "cpu")
            cache = {"HF_DATASETS_CACHE": str(workdir / "cache")}
            result = cli("lm-bench", *args, *options, "-o", engine, "--force", env=cache)
            assert result.code == 0, result.stderr
            report = json.loads(Path(engine, "report.json").read_text(encoding="utf-8"))
            out.append((items(engine), next(iter(report["models"][0]["results"].values()))))
        return out[0], out[1]

    return call


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ({}, ()),
        ({"num_fewshot": 2, "fewshot_split": "test", "description": "Proverbs.\n\n"}, ()),
        ({"target_delimiter": "", "doc_to_text": "{{question}}"}, ("--max-length", "14")),
        ({"doc_to_text": ""}, ()),
    ],
    ids=["plain", "few-shot", "spaces and truncation", "empty context"],
)
def test_multiple_choice_agrees(
    both: Any, workdir: Path, keys: dict[str, Any], options: tuple[str, ...]
) -> None:
    task = write_choice_task(workdir, **keys)
    (ours, result), (theirs, their_result) = both(task, *options)
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        assert [a[m] for m in ("acc", "acc_norm", "acc_bytes")] == [
            b[m] for m in ("acc", "acc_norm", "acc_bytes")
        ]
    assert result == their_result


def test_rolling_likelihood_of_long_texts_agrees(both: Any, workdir: Path) -> None:
    texts = [*PROVERBS[:3], " ".join(PROVERBS[:4]), " ".join(PROVERBS)]
    (workdir / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    task = write_task(
        workdir / "rolling.yaml",
        {
            "task": "rolling",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [{"metric": m} for m in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
        },
    )
    (ours, result), (theirs, their_result) = both(task, "--max-length", "24")
    for a, b in zip(ours, theirs, strict=True):
        assert a["nll"] == pytest.approx(b["nll"], abs=1e-3, rel=1e-5)
        assert (a["bytes"], a["words"]) == (b["bytes"], b["words"])
    for name in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert result[name]["value"] == pytest.approx(their_result[name]["value"], rel=1e-5)


@pytest.mark.parametrize("output_type", ["loglikelihood", "generate_until"])
def test_targets_and_generation_agree(both: Any, workdir: Path, output_type: str) -> None:
    rows = [{"start": p[:9], "end": p[9:20]} for p in PROVERBS]
    (workdir / "ends.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config: dict[str, Any] = {
        "task": "ends",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "ends.jsonl"}},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "start",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
    }
    if output_type == "generate_until":
        config["generation_kwargs"] = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
        config["metric_list"] = [{"metric": "exact_match"}]
    (ours, _), (theirs, _) = both(write_task(workdir / "ends.yaml", config))
    for a, b in zip(ours, theirs, strict=True):
        if output_type == "loglikelihood":
            assert a["acc"] == b["acc"]
            assert a["nll"] == pytest.approx(b["nll"], abs=1e-4)
        else:
            assert a["exact_match"] == b["exact_match"]
            assert a["text"] == b["text"]
