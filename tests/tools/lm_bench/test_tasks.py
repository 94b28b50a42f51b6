"""Task files: what is rendered and scored, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result

sys.path.insert(0, str(Path(__file__).parent))
from task_files import QUESTIONS, write_choice_task, write_task

from tuneutils.shared.errors import ToolError
from tuneutils.tools.lm_bench.tasks import apply_filters, extract, load_task


def generate_task(folder: Path, **keys: Any) -> Path:
    (folder / "sums.jsonl").write_text('{"q": "1+1", "a": "2"}\n{"q": "2+3", "a": "5"}\n', encoding="utf-8")
    config = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}} =",
        "doc_to_target": "a",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }
    return write_task(folder / "sums.yaml", {**config, **keys})


def test_questions_are_rendered_with_their_choices(tmp_path: Path) -> None:
    task = load_task(str(write_choice_task(tmp_path, description="Proverbs. ")))
    assert task.contexts()[0] == "Proverbs. Question: The early bird catches the\nAnswer:"
    assert [task.choices(d) for d in task.docs] == [q[1] for q in QUESTIONS]
    assert [task.gold(d) for d in task.docs] == [[q[2]] for q in QUESTIONS]


def test_templates_give_choices_and_targets_of_every_kind(tmp_path: Path) -> None:
    path = write_choice_task(tmp_path, doc_to_choice="{{options}}", doc_to_target="{{options[answer]}}")
    task = load_task(str(path))
    assert task.choices(task.docs[0]) == QUESTIONS[0][1]
    assert task.gold(task.docs[1]) == [1]
    path = write_choice_task(tmp_path, doc_to_choice={"0": "no", "1": "yes"}, doc_to_target="{{answer}}")
    task = load_task(str(path))
    assert task.choices(task.docs[0]) == ["no", "yes"]
    assert task.gold(task.docs[1]) == [1]


def test_examples_never_include_the_question(tmp_path: Path) -> None:
    task = load_task(str(write_choice_task(tmp_path, num_fewshot=3, fewshot_split="test")))
    for doc, context in zip(task.docs, task.contexts(), strict=True):
        assert context.count(doc["question"]) == 1
        assert context.count("Question:") == 4
    assert task.contexts() == task.contexts()
    first = write_choice_task(
        tmp_path, num_fewshot=1, fewshot_split="test", fewshot_config={"sampler": "first_n"}
    )
    shown = load_task(str(first)).contexts()[3]
    assert shown.startswith("Question: The early bird catches the\nAnswer: worm.\n\n")


def test_an_include_is_merged_under_the_file(tmp_path: Path) -> None:
    write_choice_task(tmp_path)
    (tmp_path / "child.yaml").write_text("include: proverbs.yaml\ntask: child\ntarget_delimiter: ''\n")
    task = load_task(str(tmp_path / "child.yaml"), limit=2)
    assert (task.name, task.config_text("target_delimiter"), len(task.docs)) == ("child", "", 2)


def test_filters_extract_answers(tmp_path: Path) -> None:
    steps = [{"function": "regex", "regex_pattern": r"(\d+)( apples)?"}, {"function": "take_first"}]
    task = load_task(str(generate_task(tmp_path, filter_list=[{"name": "number", "filter": steps}])))
    assert apply_filters(task, "There are 12 apples and 7 pears") == "12"
    assert apply_filters(task, "None") == "[invalid]"
    assert extract("a 1 b 2", r"\d", select=-1) == "2"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"process_docs": "f"}, "key 'process_docs' is not supported; --engine harness may run it"),
        ({"num_fewshots": 2}, "did you mean 'num_fewshot'?"),
        ({"dataset_path": "allenai/ai2_arc"}, "--engine harness"),
        ({"output_type": "essay"}, "output_type 'essay'"),
        ({"metric_list": [{"metric": "f1"}]}, "metric 'f1' is not supported"),
        ({"test_split": "validation"}, "needs a test_split"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl: no such file"),
        ({"doc_to_text": "{{qestion}}"}, "'qestion' is undefined"),
        ({"doc_to_text": "{{question"}, "template"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
        ({"doc_to_target": "{{answer + 7}}"}, "gives 7, not one of the 4 choices"),
        ({"doc_to_choice": "question"}, "doc_to_choice must give a list"),
        ({"num_fewshot": 9}, "num_fewshot 9 needs more documents"),
        ({"filter_list": [{"name": "x", "filter": [{"function": "majority_vote"}]}]}, "majority_vote"),
        ({"fewshot_config": {"sampler": "balanced"}}, "fewshot_config"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    path = write_choice_task(tmp_path, **keys)

    def run() -> None:
        task = load_task(str(path))
        task.contexts()
        for doc in task.docs:
            task.gold(doc)

    with pytest.raises(ToolError) as raised:
        run()
    assert said in str(raised.value)
    assert str(path.parent) in str(raised.value)


def test_code_in_a_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "code.yaml"
    path.write_text("task: code\ndoc_to_text: !function utils.text\n")
    with pytest.raises(ToolError, match=r"!function utils.text: .*--engine harness"):
        load_task(str(path))
    with pytest.raises(ToolError, match="no such task file; --engine harness"):
        load_task("hellaswag")
    path.write_text("task: [\n")
    with pytest.raises(ToolError, match=r"code\.yaml"):
        load_task(str(path))


def test_all_output_types_run_by_command(
    tmp_path: Path, tiny_model: Path, workdir: Path, click_cli: Callable[..., Result]
) -> None:
    choice = write_choice_task(tmp_path)
    rows = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}},
        "test_split": "test",
    }
    rolling = {"task": "roll", "output_type": "loglikelihood_rolling", "doc_to_target": "{{q}}={{a}}"}
    target = {"task": "last", "output_type": "loglikelihood", "doc_to_text": "{{q}} =", "doc_to_target": "a"}
    tasks = [
        choice,
        generate_task(tmp_path),
        write_task(tmp_path / "roll.yaml", {**rows, **rolling}),
        write_task(tmp_path / "last.yaml", {**rows, **target}),
    ]
    args = [arg for task in tasks for arg in ("--task", task)]
    result = click_cli("lm-bench", tiny_model, *args, "--dtype", "float32", "-o", "r")
    assert result.code == 0, result.stderr
    found = json.loads(Path("r/report.json").read_text(encoding="utf-8"))["models"][0]["results"]
    assert {task: set(metrics) for task, metrics in found.items()} == {
        "proverbs": {"acc", "acc_norm", "acc_bytes"},
        "sums": {"exact_match", "stop_rate", "length"},
        "roll": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
        "last": {"perplexity", "acc"},
    }
