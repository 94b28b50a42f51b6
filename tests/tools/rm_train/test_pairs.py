"""Preference records: what is refused and which rows are named, soft labels, margins, splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, write_jsonl

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import load_tokenizer
from tuneutils.shared.pairs import Pairs, canonical, prompt_key, read_pairs, split, validate
from tuneutils.shared.record_source import open_source
from tuneutils.shared.texts import encode_text, shortened, split_implicit
from tuneutils.tools.rm_train.params import TrainParams

from .conftest import QUICK, preferences, report_of


def pair(prompt: Any = "q", chosen: Any = "yes", rejected: Any = "no", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def read(tiny_model: Path, records: list[dict[str, Any]], on_error: str = "stop", **params: Any) -> Pairs:
    path = write_jsonl(Path("in.jsonl"), records)
    limit = params.pop("limit", 128)
    run = Run("rm-train train", TrainParams(model=str(tiny_model), **params), on_error=on_error)
    source = open_source(run, [str(path)], "records", validate=validate)
    return read_pairs(run, source, load_tokenizer(str(tiny_model)), template="auto", limit=limit)


class TestRefusals:
    def test_equal_sides(self, tiny_model: Path, workdir: Path) -> None:
        rows = [
            pair(),
            pair("a", "x ", "x"),
            pair("b"),
            pair("c", [{"role": "assistant", "content": "x"}] * 1, "x"),
        ]
        with pytest.raises(ToolError, match="not both strings"):
            read(tiny_model, rows)
        with pytest.raises(ToolError, match=r"^in.jsonl:2, in.jsonl:4: chosen and rejected are equal$"):
            read(tiny_model, [*rows[:3], pair("d", "y", "y")])
        assert len(read(tiny_model, rows, "skip").pairs) == 2

    def test_swapped_sides(self, tiny_model: Path, workdir: Path) -> None:
        turned = pair([{"role": "user", "content": "q"}], "no", "yes")
        rows = [pair(), pair("other"), turned, pair("x", "1", "1")]
        with pytest.raises(ToolError) as refused:
            read(tiny_model, rows)
        assert str(refused.value).startswith(
            "in.jsonl:4: chosen and rejected are equal; "
            "in.jsonl:1 and in.jsonl:3: chosen and rejected are swapped, and no votes say why"
        )
        kept = read(tiny_model, rows, "skip")
        assert [p.place for p in kept.pairs] == ["in.jsonl:2"]
        assert kept.refused == 3

    def test_raters_may_disagree(self, tiny_model: Path, workdir: Path) -> None:
        vote = {"votes": [{"rater": "r", "value": 1}]}
        assert len(read(tiny_model, [pair(**vote), pair("q", "no", "yes", **vote)]).pairs) == 2
        with pytest.raises(ToolError, match="swapped"):
            read(tiny_model, [pair(**vote), pair("q", "no", "yes")])

    def test_the_same_pair_twice_is_fine(self, tiny_model: Path, workdir: Path) -> None:
        assert len(read(tiny_model, [pair(), pair()]).pairs) == 2

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"margin": "big"}, "field 'margin'"),
            ({"margin": True}, "field 'margin'"),
            ({"strength": 1.2}, "field 'strength': must be a number from 0 to 1"),
            ({"votes": {"a": 1}}, "field 'votes': must be a list"),
            ({"votes": [{"rater": "x"}]}, r"field votes\[0\].value"),
            ({"chosen": [{"role": "assistant", "content": "x"}]}, "not both strings or both messages"),
            ({"chosen": "  "}, "field 'chosen': is empty"),
            ({"prompt": 3}, "field 'prompt'"),
        ],
    )
    def test_bad_fields(self, fields: dict[str, Any], says: str, tiny_model: Path, workdir: Path) -> None:
        with pytest.raises(ToolError, match=rf"in.jsonl:2: .*{says}"):
            read(tiny_model, [pair(), {**pair("b"), **fields}])

    def test_too_long(self, tiny_model: Path, workdir: Path) -> None:
        rows = [pair(), pair("word " * 60, "a", "b")]
        with pytest.raises(ToolError, match=r"in.jsonl:2: has \d+ tokens, more than 40"):
            read(tiny_model, rows, limit=40)
        assert read(tiny_model, rows, limit=40, too_long="drop").dropped == 1
        cut = read(tiny_model, rows, limit=40, too_long="truncate")
        assert cut.truncated == 1
        assert max(p.length for p in cut.pairs) == 40
        tokenizer = load_tokenizer(str(tiny_model))
        assert tokenizer.decode(cut.pairs[1].chosen.ids).endswith(
            "word <|im_end|>\n<|im_start|>assistant\na<|im_end|>"
        )

    def test_shortened_keeps_the_answer(self, tiny_model: Path) -> None:
        text = encode_text("q " * 20, "the answer", load_tokenizer(str(tiny_model)))
        with pytest.raises(ValueError, match="the completion alone has"):
            shortened(text, text.completion)
        assert shortened(text, text.completion + 1).prompt == 0


class TestLabels:
    def test_soft_labels(self, tiny_model: Path, workdir: Path) -> None:
        votes = [{"rater": str(i), "value": v} for i, v in enumerate((2, 1, 0, -1))]
        rows = [
            pair("a"),
            pair("b", strength=0.25),
            pair("c", votes=votes),
            pair("d", votes=[], strength=None),
        ]
        found = read(tiny_model, rows).pairs
        assert [p.target for p in found] == [1.0, 0.25, 2.5 / 4, 1.0]
        assert [p.has_share for p in found] == [False, True, True, False]
        assert found[2].votes == (2, 1, 0, -1)

    def test_margins(self, tiny_model: Path, workdir: Path) -> None:
        found = read(tiny_model, [pair("a", margin=2), pair("b", margin=None), pair("c")]).pairs
        assert [p.margin for p in found] == [2.0, 0.0, 0.0]

    def test_what_the_trainer_is_given(self, tiny_model: Path, workdir: Path) -> None:
        from tuneutils.tools.rm_train.trainer import rows_of

        found = read(tiny_model, [pair("a", margin=2, strength=0.7), pair("b", strength=0.5)]).pairs
        assert rows_of(found, 0.5, True, 3)["target"] == [0.7, 0.5, 1.0]
        assert rows_of(found, 0.5, False, 3)["target"] == [1.0, 0.5, 1.0]
        assert rows_of(found, 0.5, False, 3)["margin"] == [1.0, 0.0, 0.0]
        assert rows_of(found, 0.5, True, 3)["margin"] == [0.0, 0.0, 0.0]  # the share says it already


class TestImplicitPrompts:
    def test_dialogues_in_a_string(self) -> None:
        start = "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Two\n\nlines?\n\nAssistant:"
        prompt, chosen, rejected = split_implicit(start + " Yes.", start + " No.")
        assert prompt == [
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Two\n\nlines?"},
        ]
        assert (chosen, rejected) == (
            [{"role": "assistant", "content": "Yes."}],
            [{"role": "assistant", "content": "No."}],
        )
        with pytest.raises(ValueError, match="differ before their last turn"):
            split_implicit(start + " Yes.", start.replace("Hi", "Ho") + " No.")

    def test_messages(self) -> None:
        user, yes, no = (
            {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
        )
        assert split_implicit([user, yes], [user, no]) == ([user], [yes], [no])

    def test_other_strings_part_at_a_space(self) -> None:
        assert split_implicit("It is blue.", "It is black.") == ("It is ", "blue.", "black.")


class TestSplit:
    def test_no_prompt_is_on_both_sides(self, tiny_model: Path, workdir: Path) -> None:
        rows = [pair(f"q{i % 50}", f"yes {i}", f"no {i}") for i in range(200)]
        rows += [pair([{"role": "user", "content": f"q{i}"}], f"yes. {i}", f"no. {i}") for i in range(50)]
        found = read(tiny_model, rows).pairs
        train, held = split(found, 0.3, seed=0)
        assert len(train) + len(held) == 250
        assert not {p.key for p in train} & {p.key for p in held}
        assert 5 <= len({p.key for p in held}) <= 25  # 15 expected, within three deviations
        more = split(found[:40], 0.3, seed=0)  # a prompt's side does not depend on the others
        assert {p.key for p in more[1]} <= {p.key for p in held}
        assert {p.key for p in split(found, 0.3, seed=1)[1]} != {p.key for p in held}

    def test_both_sides_have_a_prompt(self, tiny_model: Path, workdir: Path) -> None:
        found = read(tiny_model, [pair("a"), pair("b")]).pairs
        for share in (0.01, 0.9):
            assert [len(side) for side in split(found, share, seed=3)] == [1, 1]
        assert split(found, 0, seed=0) == (found, [])
        assert split(found[:1], 0.5, seed=0) == (found[:1], [])

    def test_prompts_are_one_as_string_and_as_messages(self) -> None:
        assert prompt_key("Hi ") == prompt_key([{"role": "user", "content": "Hi"}])
        two = [{"role": "system", "content": "x"}, {"role": "user", "content": "Hi"}]
        assert prompt_key("Hi") != prompt_key(two)
        assert canonical(two) == json.dumps([["system", "x"], ["user", "Hi"]])


def test_named_evaluation_sets_groups_and_votes(
    rm: Callable[..., Result], records: Path, workdir: Path
) -> None:
    signs = ((1, 2, 1), (1, -1, 2), (3, 3, -1), (-1, 1, 1))
    held = [
        {
            **record, "topic": "ab"[i % 2], "strength": sum(v > 0 for v in signs[i % 4]) / 3,
            "votes": [{"rater": str(r), "value": v} for r, v in enumerate(signs[i % 4])],
        }
        for i, record in enumerate(preferences(12, start=60))
    ]  # fmt: skip
    first, second = write_jsonl(Path("a.jsonl"), held), write_jsonl(Path("b.jsonl"), preferences(5, start=90))
    done = rm(records, *QUICK, "--eval", f"near={first}", "--eval", str(second), "--by", "topic")
    assert done.code == 0, done.stderr
    report = report_of(Path("out"))
    assert {k: v["n"] for k, v in report["by_split"].items()} == {"train": 40, "near": 12, "eval": 5}
    assert {k: v["n"] for k, v in report["by_group"].items()} == {"a": 6, "b": 6, "None": 5}
    assert [b["from"] for b in report["by_agreement"]] == [0.6, 0.9]
    # unanimous items agree thrice; of a two-to-one item only the odd one out has others that agree
    assert report["human_ceiling"]["rater"]["value"] == pytest.approx((3 * 3 + 0) / (3 * 3 + 9))
    assert report["human_ceiling"]["rater"]["n"] == 3 * 3 + 9


def test_the_ceiling_is_unknown_without_votes(rm: Callable[..., Result], records: Path) -> None:
    assert rm(records, *QUICK).code == 0
    assert report_of(Path("out"))["human_ceiling"].startswith("unknown")


def test_leaking_prompts_are_told(rm: Callable[..., Result], records: Path) -> None:
    path = write_jsonl(Path("held.jsonl"), preferences(3))
    done = rm(records, *QUICK, "--max-steps", "1", "--eval", str(path))
    assert "3 prompts of eval are also learnt from" in done.stderr
