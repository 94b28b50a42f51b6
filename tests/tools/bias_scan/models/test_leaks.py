"""``bias-scan leaks``: exact and near copies found, where and how often, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, write_jsonl

Cli = Callable[..., Result]
A = "The old doctor said that the young nurse was late for the meeting again today"
B = "Many hands make light work but too many cooks spoil the broth for everyone here"
SHORT = "He was late"


@pytest.fixture
def leaks(workdir: Path, click_cli: Cli) -> Callable[..., Any]:
    write_jsonl(
        workdir / "set.jsonl", [{"sent_more": A, "sent_less": B, "bias_type": "x", "id": A}, {"text": SHORT}]
    )

    def call(train: list[dict[str, Any]], *args: str) -> Any:
        write_jsonl(workdir / "train.jsonl", train)
        done = click_cli("bias-scan", "leaks", "train.jsonl", "--against", "set.jsonl", *args)
        return done.code, [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return call


def test_an_exact_copy_whatever_its_case_and_punctuation(leaks: Any) -> None:
    copy = A.upper().replace(" SAID", ", said:") + "! And so on."
    code, found, err = leaks(
        [{"text": "nothing"}, {"messages": [{"role": "user", "content": copy}]}, {"text": A}]
    )
    assert code == 0
    (one,) = found
    assert (one["kind"], one["overlap"], one["train_records"]) == ("exact", 1.0, 2)
    assert (one["test"], one["field"], one["train"]) == ("set.jsonl:1", "sent_more", "train.jsonl:2")
    assert "1 of 2 texts leaked (1 exactly) into 3 records; 1 texts shorter than 6 words" in err


def test_a_near_copy(leaks: Any) -> None:
    """Of 8 grams of 8 words, one changed last word leaves 7."""
    near = A.rsplit(" ", 1)[0] + " yesterday"
    _, found, _ = leaks([{"text": near}])
    assert [(f["kind"], f["overlap"]) for f in found] == [("near", 0.875)]
    assert leaks([{"text": near}], "--near", "0.9")[1] == []


def test_the_same_grams_in_other_places_are_no_exact_copy(leaks: Any) -> None:
    words = B.split()
    parts = " / ".join(" ".join(words[i : i + 8]) for i in range(len(words) - 7))
    (one,) = leaks([{"text": parts}])[1]
    assert (one["kind"], one["overlap"]) == ("near", 1.0)


def test_half_a_sentence_is_no_leak(leaks: Any) -> None:
    assert leaks([{"text": " ".join(A.split()[:9])}])[1] == []


def test_a_gap_is_filled_by_any_word(workdir: Path, click_cli: Cli) -> None:
    text = "The driver picked up [the cook] because [MASK] could not find a bus there"
    write_jsonl(workdir / "s.jsonl", [{"text": text, "options": "A. he B. she C. both A and B"}])
    said = text.replace("[MASK]", "she").replace("[", "").replace("]", "")
    write_jsonl(
        workdir / "t.jsonl", [{"text": f"Look: {said}."}, {"text": said.replace("she could", "could")}]
    )
    done = click_cli("bias-scan", "leaks", "t.jsonl", "--against", "s.jsonl")
    found = json.loads(done.stdout)
    assert (found["kind"], found["train"], found["train_records"]) == ("exact", "t.jsonl:1", 2)
    assert "1 of 1 texts leaked" in done.stderr


def test_the_gate(leaks: Any) -> None:
    code, found, err = leaks([{"text": B}], "--fail")
    assert (code, len(found)) == (1, 1)
    assert "1 of 2 texts leaked, such as set.jsonl:1 in train.jsonl:1" in err
    assert leaks([{"text": "nothing of that kind"}], "--fail")[0] == 0


def test_a_set_too_short_to_look_for(workdir: Path, click_cli: Cli) -> None:
    write_jsonl(workdir / "s.jsonl", [{"text": SHORT}])
    done = click_cli("bias-scan", "leaks", "s.jsonl", "--against", "s.jsonl")
    assert done.code == 65
    assert "no text of 6 words or more" in done.error
    done = click_cli("bias-scan", "leaks", "s.jsonl", "--against", "s.jsonl", "--min-words", "3")
    assert json.loads(done.stdout)["kind"] == "exact"
