"""Preferences by a constitution: the file, the rules by which pairs are dropped, and what is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, invoke, load_tool, tiny_records, write_jsonl

from tuneutils.tools.pref_tune.constitution import Principle, load
from tuneutils.tools.pref_tune.draft import Row, drawn, messages_of, pair_of, repeated, settled
from tuneutils.tools.pref_tune.params import ConstitutionParams

from .conftest import CPU

PRINCIPLES = """
principles:
  - {id: kind, principle: Be kind., critique_request: "Why? {principle}", revision_request: Again.}
  - {id: true, principle: Be true., critique_request: "Is it?", revision_request: Once more.}
"""
KIND = Principle("kind", "Be kind.", "Is it? {principle}", "Write it again.")
PARAMS = ConstitutionParams(model="m")


def row(draft: str = "A draft.", critique: str = "It is rude.") -> Row:
    return Row(0, {"prompt": "Hi", "n": 1}, [], draft, draft, [critique], [KIND])


class TestRules:
    @pytest.mark.parametrize(
        ("text", "ended", "why"),
        [
            ("A better draft.", True, None),
            ("", True, "revision empty"),
            ("A better", False, "revision unfinished"),
            ("  a DRAFT!", True, "revision equals the draft"),
            ("It is rude", True, "revision repeats the critique"),
            ("It is rude to you and to me", True, None),
            ("Write it again. A better draft.", True, "revision repeats the request"),
            ("so it goes " * 12, True, "revision repeats itself"),
            ("Here is the revised answer:\nA draft.", True, "revision equals the draft"),
            ("Sure, here it is:\n", True, "revision empty"),
        ],
    )
    def test_reasons(self, text: str, ended: bool, why: str | None) -> None:
        assert settled(row(), text, ended, PARAMS)[1] == why

    def test_a_critique_said_again_in_other_words(self) -> None:
        assert repeated("a b c d e", "x a b c d") == 0.5  # one 4-gram of two
        assert repeated("It is RUDE", "it is rude.") == 1.0
        assert repeated("a b c", "a b c d") == 0.0

    def test_what_is_said_before_a_revision_is_not_part_of_it(self) -> None:
        assert settled(row(), "Here's a kinder version: Good morning.", True, PARAMS) == (
            "Good morning.",
            None,
        )
        assert settled(row(), '"Good morning."', True, PARAMS) == ("Good morning.", None)
        assert settled(row(), "Note: wash it first.", True, PARAMS) == ("Note: wash it first.", None)

    def test_a_pair_keeps_what_its_record_holds(self) -> None:
        made = row()
        made.revision = "Better."
        assert pair_of(made) == {
            "prompt": "Hi", "n": 1, "chosen": "Better.", "rejected": "A draft.",
            "principle": "kind", "critique": "It is rude.",
        }  # fmt: skip

    def test_principles_are_drawn_evenly_and_by_place(self) -> None:
        found = Counter(drawn([KIND, PARAMS], 1, i, 0) is KIND for i in range(2000))  # type: ignore[list-item]
        assert abs(found[True] - 1000) < 5 * (2000 / 4) ** 0.5
        assert [drawn([1, 2, 3], 4, i, 0) for i in range(9)] == [drawn([1, 2, 3], 4, i, 0) for i in range(9)]  # type: ignore[list-item]

    def test_a_conversation_is_answered_where_its_last_answer_stood(self) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert messages_of({"messages": turns}) == turns[:1]
        assert messages_of({"messages": [*turns, turns[0]]}) == [*turns, turns[0]]


class TestFile:
    def test_the_shipped_one(self) -> None:
        made = load("builtin:example")
        assert len(made) == 6
        assert made[0].principle in made[0].critique()
        assert "{principle}" not in made[0].critique()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("principles: [", "not YAML"),
            ("[]", "must have a list of principles"),
            ("principles: []", "has no principles"),
            ("principles: [{id: a}]", "principle 1: principle must be a text"),
            ("principals: []\nprinciples: []", "unknown key 'principals' (did you mean 'principles'?)"),
            ("principles: [3]", "principle 1: must have id"),
            (PRINCIPLES.replace("id: true", "id: kind"), "two principles have the id 'kind'"),
            (PRINCIPLES, "principle 2: id must be a text, is True"),
        ],
    )
    def test_errors_name_the_place(self, text: str, says: str, tmp_path: Path) -> None:
        from tuneutils.shared.errors import ToolError

        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(ToolError) as caught:
            load(str(path))
        assert str(caught.value).startswith(str(path))
        assert says in str(caught.value)


class TestCommand:
    @pytest.fixture
    def write(self, workdir: Path, tiny_model: Path) -> Callable[..., Result]:
        (workdir / "c.yaml").write_text(PRINCIPLES.replace("id: true", "id: 'true'"))
        write_jsonl(workdir / "prompts.jsonl", tiny_records("prompt", 12))

        def call(*args: str, output: str = "out.jsonl") -> Result:
            given = ("constitution", "prompts.jsonl", "-m", str(tiny_model), "-o", output, *CPU)
            return invoke(
                load_tool("pref-tune"), *given, "--principles", "c.yaml", "--max-new-tokens", "6", *args
            )

        return call

    def test_pairs_are_what_pref_tune_learns_from(
        self, write: Callable[..., Result], tiny_model: Path
    ) -> None:
        done = write("--unfinished", "keep", "--rounds", "2")
        assert done.code == 0, done.stderr
        rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        metrics = json.loads(Path("out.jsonl.artifact.json").read_text())["metrics"]
        assert metrics["pairs"] == len(rows)
        assert metrics["pairs"] + sum(metrics["dropped"].values()) == metrics["prompts"] == 12
        assert Counter(r["principle"] for r in rows) == metrics["principles"]
        assert all(r["chosen"] != r["rejected"] for r in rows)
        args = ("-q", "-m", str(tiny_model), "-o", "out", "--max-steps", "1", "--answers", "0", *CPU)
        assert invoke(load_tool("pref-tune"), "out.jsonl", *args).code == 0

    def test_what_is_dropped_is_counted_and_kept_with_its_reason(self, write: Callable[..., Result]) -> None:
        done = write("--dropped", "dropped.jsonl")
        assert (done.code, "no pair left; dropped: 12 draft unfinished" in done.error) == (65, True), (
            done.stderr
        )
        assert not Path("out.jsonl").exists()

    def test_a_row_does_not_depend_on_its_batch(self, write: Callable[..., Result]) -> None:
        assert write("--unfinished", "keep").code == 0
        assert write("--unfinished", "keep", "--batch-size", "5", output="five.jsonl").code == 0
        assert Path("out.jsonl").read_bytes() == Path("five.jsonl").read_bytes()

    def test_without_a_chat_template(
        self, write: Callable[..., Result], tiny_model: Path, tmp_path: Path
    ) -> None:
        import shutil

        folder = tmp_path / "plain"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").unlink()
        done = write("--unfinished", "keep", "-m", str(folder))
        assert done.code == 0, done.stderr
        assert len(Path("out.jsonl").read_text().splitlines()) > 0
