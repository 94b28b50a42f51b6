"""generate, simulate and export: what goes in and what comes out."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import write_jsonl

from tuneutils.shared.artifact import load_manifest
from tuneutils.shared.records import check, read


def vote(item: str, rater: str, value: int, **changes: Any) -> dict[str, Any]:
    return {
        "item": item,
        "prompt": f"prompt {item}",
        "completion_a": f"a {item}",
        "completion_b": f"b {item}",
        "rater": rater,
        "value": value,
        "both_bad": False,
        "left": "a",
        "aspects": {},
        "reason": "",
        "edited": "",
        "repeat": False,
        "gold": None,
        "seconds": 3.0,
        "simulated": False,
        "extra": {},
        **changes,
    }


@pytest.fixture
def exported(workdir: Path, click_cli: Callable[..., Any]) -> Callable[..., list[dict[str, Any]]]:
    def export(rows: list[dict[str, Any]], *args: str) -> list[dict[str, Any]]:
        write_jsonl(Path("votes.jsonl"), rows)
        done = click_cli("pref-collect", "export", "votes.jsonl", "-o", "out.jsonl", "--force", "-q", *args)
        assert done.code == 0, done.stderr
        return read("out.jsonl")

    return export


class TestExport:
    def test_preference_rows(self, exported: Any) -> None:
        rows = exported(
            [
                vote("1", "x", 3),
                vote("1", "y", -1, reason="shorter"),
                vote("1", "z", 0),
                vote("1", "z", -3, repeat=True),
                vote("2", "x", -2),
            ]
        )
        assert [check(row, ("preference",)) for row in rows] == ["preference"] * 2
        one, two = rows
        assert (one["chosen"], one["rejected"]) == ("a 1", "b 1")
        assert (one["margin"], one["strength"], one["n_raters"]) == (pytest.approx(2 / 3), 0.5, 3)
        assert [v["value"] for v in one["votes"]] == [3, -1, 0]
        assert one["votes"][1]["reason"] == "shorter"
        assert (two["chosen"], two["margin"], two["strength"]) == ("b 2", 2.0, 1.0)
        assert two["votes"][0]["value"] == 2, "turned towards chosen"

    def test_ties(self, exported: Any) -> None:
        rows = [vote(str(i), "x", 0) for i in range(40)] + [vote("w", "x", 1)]
        assert [r["item"] for r in exported(rows)] == ["w"]
        random = exported(rows, "--ties", "random")
        assert [r["margin"] for r in random] == [0.0] * 40 + [1.0]
        firsts = Counter(r["chosen"][0] for r in random[:40])
        assert set(firsts) == {"a", "b"}

    def test_both_bad(self, exported: Any) -> None:
        bad = {"both_bad": True}
        rows = [vote("1", "x", 0, **bad), vote("1", "y", 0, **bad), vote("1", "z", 2), vote("2", "x", 1)]
        assert [r["item"] for r in exported(rows)] == ["2"]
        kept = exported(rows, "--both-bad", "tie")
        assert [r["item"] for r in kept] == ["1", "2"]
        assert kept[0]["strength"] == pytest.approx(2 / 3)

    def test_gold_and_thin_items_are_left_out(self, exported: Any) -> None:
        rows = [vote("g", "x", 3, gold="a"), vote("1", "x", 1), vote("2", "x", 1), vote("2", "y", 1)]
        assert [r["item"] for r in exported(rows, "--min-raters", "2")] == ["2"]
        assert [r["item"] for r in exported(rows, "--gold")] == ["g", "1", "2"]

    def test_unpaired(self, exported: Any) -> None:
        rows = exported([vote("1", "x", -1)], "--format", "unpaired")
        assert [(r["completion"], r["label"]) for r in rows] == [("b 1", True), ("a 1", False)]
        assert {check(r, ("unpaired",)) for r in rows} == {"unpaired"}

    def test_ratings(self, exported: Any) -> None:
        def rated(item: str, rater: str, value: int) -> dict[str, Any]:
            row = vote(item, rater, value)
            for name in ("completion_a", "completion_b", "both_bad", "left"):
                del row[name]
            return {**row, "completion": f"c {item}"}

        rows = [rated("1", "x", 6), rated("1", "y", 3), rated("2", "x", 1), rated("3", "x", 4)]
        made = exported(rows, "--format", "unpaired")
        assert [(r["completion"], r["label"], r["rating"], r["strength"]) for r in made] == [
            ("c 1", True, 4.5, 0.5),
            ("c 2", False, 1.0, 1.0),
        ]

    def test_edited_answers_make_pairs_of_their_own(self, exported: Any) -> None:
        rows = exported([vote("1", "x", 2, edited="best")])
        assert [(r["chosen"], r["rejected"]) for r in rows] == [("a 1", "b 1"), ("best", "a 1")]
        assert len(exported([vote("1", "x", 2, edited="best")], "--no-edited")) == 1

    def test_no_prompt_on_two_sides(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        rows = [
            vote(f"{i}-{j}", "x", 1, prompt=("  Prompt " if j else "prompt ") + str(i))
            for i in range(200)
            for j in range(2)
        ]
        write_jsonl(Path("votes.jsonl"), rows)
        args = ("export", "votes.jsonl", "-o", "out", "--split", "train=0.8,test=0.2", "-q")
        assert click_cli("pref-collect", *args).code == 0
        sides = {n: read(f"out/{n}.jsonl") for n in ("train", "test")}
        keys = {n: {r["item"].split("-")[0] for r in rows} for n, rows in sides.items()}
        assert not keys["train"] & keys["test"]
        assert sum(map(len, sides.values())) == 400
        expected, deviation = 40, math.sqrt(200 * 0.2 * 0.8)
        assert abs(len(keys["test"]) - expected) < 4 * deviation
        assert load_manifest("out")["metrics"]["split"] == {n: len(r) for n, r in sides.items()}

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"value": 4}, "field 'value': must be an integer from -3 to 3"),
            ({"value": True}, "field 'value'"),
            ({"left": "c"}, "field 'left'"),
            ({"rater": 3}, "field 'rater'"),
        ],
    )
    def test_bad_votes_are_named(
        self, workdir: Path, click_cli: Callable[..., Any], change: dict[str, Any], says: str
    ) -> None:
        write_jsonl(Path("votes.jsonl"), [vote("1", "x", 1), {**vote("2", "x", 1), **change}])
        done = click_cli("pref-collect", "export", "votes.jsonl")
        assert done.code == 65
        assert done.error.startswith("votes.jsonl:2: ")
        assert says in done.error

    @pytest.mark.parametrize("command", ["export", "report"])
    def test_preferences_are_no_votes(
        self, workdir: Path, click_cli: Callable[..., Any], command: str
    ) -> None:
        write_jsonl(Path("pairs.jsonl"), [{"prompt": "p", "chosen": "a", "rejected": "b"}])
        done = click_cli("pref-collect", command, "pairs.jsonl", "-o", "out")
        assert done.code == 65
        assert "pairs.jsonl:1: is no vote, lacks item, rater, value" in done.error


def candidates_file(count: int = 40, **extra: Any) -> Path:
    rows = [
        {
            "prompt": f"p {i}",
            "completion_a": "word " * (1 + i % 7),
            "completion_b": "word " * (9 - i % 5) + ".",
            **extra,
        }
        for i in range(count)
    ]
    return write_jsonl(Path("candidates.jsonl"), rows)


class TestSimulate:
    def simulate(self, click_cli: Callable[..., Any], *args: str) -> list[dict[str, Any]]:
        line = ("simulate", "candidates.jsonl", "-o", "votes.jsonl", "--force", "-q", *args)
        done = click_cli("pref-collect", *line)
        assert done.code == 0, done.stderr
        return read("votes.jsonl")

    def test_everything_says_that_it_is_simulated(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file()
        rows = self.simulate(click_cli)
        assert all(r["simulated"] is True and r["rater"].startswith("simulated-") for r in rows)
        assert load_manifest("votes.jsonl.artifact.json")["simulated"] is True
        assert click_cli("pref-collect", "export", "votes.jsonl", "-o", "p.jsonl", "-q").code == 0
        assert all(r["simulated"] is True for r in read("p.jsonl"))
        assert load_manifest("p.jsonl.artifact.json")["simulated"] is True
        assert click_cli("pref-collect", "report", "votes.jsonl", "-o", "report", "-q").code == 0
        assert load_manifest("report")["simulated"] is True
        assert "These votes are simulated" in Path("report/index.html").read_text()

    def test_the_rule_without_noise(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file()
        for row in self.simulate(click_cli, "--flip-rate", "0", "--overlap", "2"):
            a, b = len(row["completion_a"].split()), len(row["completion_b"].split())
            assert (row["value"] > 0) == (a > b)

    def test_scores(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file(score_a=0.5, score_b=2.0)
        rows = self.simulate(click_cli, "--rule", "score", "--flip-rate", "0")
        assert {r["value"] for r in rows} == {-3}

    def test_flips_and_bias_have_the_stated_rate(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file(400)
        rows = self.simulate(click_cli, "--flip-rate", "0.2", "--overlap", "3")
        wrong = [
            (r["value"] > 0) != (len(r["completion_a"].split()) > len(r["completion_b"].split()))
            for r in rows
        ]
        assert sum(wrong) / len(wrong) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 1200))
        rows = self.simulate(click_cli, "--flip-rate", "0", "--position-bias", "0.5", "--overlap", "3")
        left = [(r["value"] > 0) == (r["left"] == "a") for r in rows]
        assert sum(left) / len(left) == pytest.approx(0.75, abs=4 * math.sqrt(0.19 / 1200))

    def test_overlap_repeats_and_gold(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        rows = read(candidates_file(60))
        gold = [
            {"id": f"g{i}", "prompt": "g", "completion_a": "x", "completion_b": "y", "gold": "a"}
            for i in range(3)
        ]
        write_jsonl(Path("candidates.jsonl"), rows + gold)
        votes = self.simulate(
            click_cli, "--overlap", "2", "--raters", "4", "--repeat-share", "0.3", "--repeat-gap", "5"
        )
        first = [v for v in votes if not v["repeat"] and v["gold"] is None]
        assert set(Counter(v["item"] for v in first).values()) == {2}
        assert max(Counter((v["rater"], v["item"]) for v in first).values()) == 1
        repeats = [v for v in votes if v["repeat"]]
        assert repeats
        assert max(Counter((v["rater"], v["item"]) for v in repeats).values()) == 1
        assert {v["gold"] for v in votes} == {None, "a"}
        assert {v["gold"] for v in repeats} == {None}

    def test_order_of_the_answers_is_random(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file(400)
        left = Counter(r["left"] for r in self.simulate(click_cli))
        assert left["a"] == pytest.approx(200, abs=4 * 10)


class TestCandidates:
    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"prompt": "p", "completion_a": "x"}, "needs the fields"),
            ({"prompt": "p", "completion_a": "x", "completion_b": "x"}, "the same: nothing to compare"),
            ({"prompt": "p", "completion_a": "x", "completion_b": " "}, "field 'completion_b': is empty"),
            ({"prompt": "p", "completion_a": "x", "completion_b": 3}, "field 'completion_b'"),
            ({"prompt": "p", "completion_a": "x", "completion_b": "y", "gold": "c"}, "field 'gold'"),
            ({"prompt": "p", "completion": "y"}, "this study compares two"),
            (
                {"prompt": "q", "completion_a": "1", "completion_b": "2"},
                "the same item as candidates.jsonl:1",
            ),
        ],
    )
    def test_bad_ones_are_named(
        self, workdir: Path, click_cli: Callable[..., Any], row: dict[str, Any], says: str
    ) -> None:
        good = {"prompt": "q", "completion_a": "1", "completion_b": "2"}
        write_jsonl(Path("candidates.jsonl"), [good, row])
        done = click_cli("pref-collect", "simulate", "candidates.jsonl")
        assert done.code == 65
        assert done.error.startswith("candidates.jsonl:2: ")
        assert says in done.error


class TestGenerate:
    def test_two_samples_of_one_model(
        self, workdir: Path, click_cli: Callable[..., Any], tiny_model: Path
    ) -> None:
        write_jsonl(Path("prompts.jsonl"), [{"prompt": f"Say {i}", "tag": i} for i in range(6)])
        args = ("generate", "prompts.jsonl", "-m", tiny_model, "--max-new-tokens", "8", "--device", "cpu")
        args += ("--dtype", "float32", "-q")
        assert click_cli("pref-collect", *args, "-o", "one.jsonl").code == 0
        rows = read("one.jsonl")
        assert len(rows) >= 4
        assert all(r["completion_a"] != r["completion_b"] and "tag" in r for r in rows)
        assert {r["model_a"] for r in rows} == {str(tiny_model)}
        assert click_cli("pref-collect", *args, "-o", "two.jsonl").code == 0
        assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
        assert click_cli("pref-collect", *args, "--limit", "3", "-o", "few.jsonl").code == 0
        assert {r["tag"] for r in read("few.jsonl")} <= {0, 1, 2}

    def test_one_of_each_of_two_models(
        self, workdir: Path, click_cli: Callable[..., Any], tiny_model: Path, other_tiny_model: Path
    ) -> None:
        write_jsonl(Path("prompts.jsonl"), [{"prompt": "Say"}, {"prompt": "no " * 400}])
        args = ("generate", "prompts.jsonl", "-m", tiny_model, "-m", other_tiny_model, "--on-error", "skip")
        args += ("--max-new-tokens", "4", "--temperature", "0", "--device", "cpu", "--dtype", "float32")
        done = click_cli("pref-collect", *args, "-o", "out.jsonl")
        assert done.code == 0, done.stderr
        (row,) = read("out.jsonl")
        assert (row["model_a"], row["model_b"]) == (str(tiny_model), str(other_tiny_model))
        inputs = load_manifest("out.jsonl.artifact.json")["inputs"]
        assert [i["role"] for i in inputs] == ["prompts", "model", "model"]

    def test_least_sure_pairs_first(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        gaps = [3.0, 0.1, -2.0, 0.0, -0.5]
        rows = [
            {"id": i, "prompt": "p", "completion_a": "x", "completion_b": "y", "score_a": g, "score_b": 0}
            for i, g in enumerate(gaps)
        ]
        write_jsonl(Path("scored.jsonl"), rows)
        done = click_cli("pref-collect", "generate", "scored.jsonl", "--select", "3", "-q")
        assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [3, 1, 4]

    def test_unscored_pairs_are_refused(self, workdir: Path, click_cli: Callable[..., Any]) -> None:
        candidates_file(2)
        done = click_cli("pref-collect", "generate", "candidates.jsonl", "--select", "1")
        assert (done.code, "score_a" in done.error) == (65, True)
        done = click_cli("pref-collect", "generate", "candidates.jsonl", "--select", "1", "--limit", "1")
        assert (done.code, "--limit is for prompts" in done.error) == (2, True)

    def test_greedy_pairs_of_one_model_are_refused(
        self, workdir: Path, click_cli: Callable[..., Any], tiny_model: Path
    ) -> None:
        candidates_file(1)
        done = click_cli(
            "pref-collect", "generate", "candidates.jsonl", "-m", tiny_model, "--temperature", "0"
        )
        assert (done.code, "same answer twice" in done.error) == (2, True)
