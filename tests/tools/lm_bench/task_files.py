"""Small task files in lm-evaluation-harness's format, with their data."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    ("The early bird catches the", ["worm.", "bush in the hand.", "sea", "東京"], 0),
    ("Many hands make", ["deep water", "light work;", "apples come down said the tree"], 1),
    ("Still waters run ", ["deep,", "bottles", "Größe"], 0),
    ("Measure twice and", ["cut once.", "spoil the broth with too many cooks", "go up"], 0),
    ("What goes up must come", ["in", "down, said the apple", "1"], 1),
    ("Ten green bottles hang on the  ", ["tree", "wall: 10, 9", "bird"], 1),
]


def write_choice_task(folder: Path, **keys: object) -> Path:
    """A multiple-choice task over ``QUESTIONS``; ``keys`` are added to the file."""
    data = folder / "questions.jsonl"
    rows = [{"question": q, "options": o, "answer": a} for q, o, a in QUESTIONS]
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return write_task(
        folder / "proverbs.yaml",
        {
            "task": "proverbs",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "options",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True}
                for m in ("acc", "acc_norm", "acc_bytes")
            ],
            **keys,
        },
    )


def write_task(path: Path, config: dict[str, object]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
