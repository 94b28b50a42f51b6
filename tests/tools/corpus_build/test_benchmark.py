"""The benchmark's items against what is promised of them, run by lm-bench; questions against the passages."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from support import invoke, load_tool

from tuneutils.tools.corpus_build.mine import questions, summary
from tuneutils.tools.corpus_build.roundtrip import agrees, f1, returned, written

NOUNS = ("court", "judge", "clerk", "jury", "panel", "board", "mayor", "guard", "agent", "nurse")
THINGS = ("motion", "appeal", "letter", "report", "notice", "claim", "order", "record", "paper", "draft")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def bench(workdir: Path) -> Path:
    rng = random.Random(3)
    with open("raw.jsonl", "w") as sink:
        for i in range(80):
            said = " ".join(
                f"On day {i} the {rng.choice(NOUNS)} of town {n} sent the {rng.choice(THINGS)} number "
                f"{rng.randrange(10**6)} to the {rng.choice(NOUNS)} and kept the {rng.choice(THINGS)}."
                for n in range(2)
            )
            sink.write(json.dumps({"text": said}) + "\n")
    options = ("--rule", "c4-lorem-ipsum", "--heldout", "0.3", "--workers", "1", "-q")
    assert invoke(load_tool("corpus-build"), *options, "raw.jsonl", "-o", "corpus").code == 0
    done = invoke(load_tool("corpus-build"), "benchmark", "corpus", "-q", "-o", "bench")
    assert done.code == 0, done.stderr
    return Path("bench")


def test_items_keep_their_promises(bench: Path) -> None:
    train = [r["text"] for r in lines(Path("corpus/train.jsonl"))]
    heldout = {r["id"]: r["text"] for r in lines(Path("corpus/heldout.jsonl"))}
    words = re.findall(r"[^\W\d_]+", " ".join(train))
    grams = {
        tuple(w[i : i + 8]) for t in train for w in [re.findall(r"\w+", t.lower())] for i in range(len(w) - 7)
    }
    items = lines(bench / "items.jsonl")
    assert len(items) > 10
    for item in items:
        assert item["choices"][item["answer"]] == item["word"]
        assert len(set(item["choices"])) == 4
        assert item["sentence"] in heldout[item["id"]]
        assert f"{item['context']} {item['word']}"[-60:] in " ".join(heldout[item["id"]].split())
        counts = [words.count(choice) for choice in item["choices"]]
        assert all(0.5 <= count / words.count(item["word"]) <= 2 for count in counts)
        said = re.findall(r"\w+", item["sentence"].lower())
        assert not any(tuple(said[i : i + 8]) in grams for i in range(len(said) - 7))
        assert item["word"].lower() not in item["context"].lower().split()


def test_lm_bench_runs_both_tasks(bench: Path, tiny_model: Path) -> None:
    tasks = ("--task", bench / "choice.yaml", "--task", bench / "cloze.yaml")
    done = invoke(
        load_tool("lm-bench"),
        tiny_model,
        *tasks,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "-q",
        "--json",
        "-o",
        "r",
    )
    assert done.code == 0, done.stderr
    results = done.json()["models"][0]["results"]
    assert results["domain_choice"]["acc"]["n"] == len(lines(bench / "items.jsonl"))
    assert 0 <= results["domain_choice"]["acc"]["value"] <= 1
    assert results["domain_cloze"]["perplexity"]["value"] > 1


PASSAGE = (
    "A writ is a formal order under seal that a court gives to an officer. The plaintiffs appealed because the order "
    "had never been served on them. On May 8, 2003, the court of appeals affirmed the order in part. If the fee is "
    "not paid within ten days, the clerk returns the complaint to its sender."
)


def test_rules_ask_what_the_passage_answers() -> None:
    found = {q.kind: (q.question, q.answer) for q in questions(PASSAGE)}
    assert found["definition"] == (
        "What is a writ?",
        "A formal order under seal that a court gives to an officer.",
    )
    assert found["cause"] == (
        "Why is it said that the plaintiffs appealed?",
        "Because the order had never been served on them.",
    )
    assert found["date"] == (
        "When did this happen: the court of appeals affirmed the order in part?",
        "May 8, 2003",
    )
    assert found["condition"] == (
        "What holds if the fee is not paid within ten days?",
        "The clerk returns the complaint to its sender.",
    )
    assert found["summary"][1] in PASSAGE


def test_summary_takes_the_most_central_sentence() -> None:
    said = ["Cats like milk.", "Cats like fish and milk.", "Cats like fish.", "The sky was grey that day."]
    assert summary(said, 0.25) == "Cats like fish and milk."


def test_f1_is_squads() -> None:
    """Worked out by hand: two of three and two of two words in common."""
    assert f1("the cat sat down", "cat sat") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert f1("The Cat.", "cat") == 1
    assert f1("dog", "cat") == 0
    assert agrees("May 8, 2003", "It was on May 8, 2003, in court.", 0.6)
    assert not agrees("May 8, 2003", "It was on May 9, 2003.", 0.9)


def test_round_trip_keeps_what_comes_back() -> None:
    def model(prompts: Any) -> list[str]:
        return ["A formal order" if "writ" in p.split("Question:")[-1] else "I do not know" for p in prompts]

    mined = list(questions(PASSAGE))
    kept, lost = returned(mined, model, 0.3)
    assert {q.kind for q in kept} >= {"definition", "summary", "continuation"}
    assert {q.kind for q in lost} == {"cause", "date", "condition"}
    asked = written([PASSAGE], lambda prompts: ["What was it about?" for _ in prompts], per_passage=2, seed=0)
    assert len(asked) == 2
    assert all(q.answer in PASSAGE for q in asked)
