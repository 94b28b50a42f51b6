"""``cf-augment``: records, links, spans, chats, modes and reports."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Result, write_jsonl

Augment = Callable[..., Result]


@pytest.fixture
def augment(click_cli: Callable[..., Result], workdir: Path) -> Augment:
    return lambda *args, **keywords: click_cli("cf-augment", *args, **keywords)


def run(augment: Augment, records: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    write_jsonl(Path("in.jsonl"), records)
    done = augment("in.jsonl", *options)
    assert done.code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_twins_name_their_source(augment: Augment) -> None:
    rows = run(
        augment, [{"id": "a", "text": "She left."}, {"text": "It rained."}, {"text": "He stayed.", "n": 1}]
    )
    assert [r["text"] for r in rows] == ["She left.", "He left.", "It rained.", "He stayed.", "She stayed."]
    assert (rows[1]["twin_of"], rows[1]["id"]) == ("a", "a#gender")
    assert rows[2] == {"text": "It rained."}
    assert rows[4]["twin_of"] == rows[3]["id"]
    assert rows[4]["n"] == 1


def test_chat_roles_labels_and_order_stay(augment: Augment) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Is Mary at home with her mother?"},
        {"role": "assistant", "content": "Mary is; she said so herself.", "name": "bot"},
    ]
    twin = run(augment, [{"messages": chat, "label": True}], "--mode", "twins")[0]
    assert [m["role"] for m in twin["messages"]] == ["system", "user", "assistant"]
    assert [m["content"] for m in twin["messages"]] == [
        "Be kind.", "Is John at home with his father?", "John is; he said so himself.",
    ]  # fmt: skip
    assert (twin["label"], twin["messages"][2]["name"]) == (True, "bot")


def test_preferences_change_on_all_sides(augment: Augment) -> None:
    record = {"prompt": "Where is she?", "chosen": "She is out.", "rejected": "Who knows her?"}
    twin = run(augment, [record], "--mode", "twins")[0]
    assert [twin[k] for k in record] == ["Where is he?", "He is out.", "Who knows him?"]


def test_spans_point_at_the_same_things(augment: Augment) -> None:
    text = "Elizabeth told her mother that the red house in Rome was hers."
    things = {
        "Elizabeth": "Michael",
        "her mother": "his father",
        "red house": "red house",
        "Rome": "Rome",
        "hers": "his",
    }
    spans = []
    for thing in things:
        at = text.rindex(thing)
        spans.append({"start": at, "end": at + len(thing), "text": thing, "label": "X"})
    listed = [[s["start"], s["end"], "Y"] for s in spans]
    twin = run(augment, [{"text": text, "spans": spans}], "--mode", "twins")[0]
    assert [twin["text"][s["start"] : s["end"]] for s in twin["spans"]] == list(things.values())
    assert [s["text"] for s in twin["spans"]] == list(things.values())
    twin = run(augment, [{"text": text, "spans": listed}], "--mode", "twins")[0]
    assert [twin["text"][a:b] for a, b, _ in twin["spans"]] == list(things.values())


def test_moves_agree_with_a_walk_over_characters() -> None:
    """Brute force: every character that no edit covers keeps its place among its neighbours."""
    from tuneutils.tools.cf_augment.fields import Moves

    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("abcdefgh") for _ in range(20))
        cuts = sorted(draw.sample(range(21), 4))
        edits = [(cuts[0], cuts[1], "X" * draw.randrange(4)), (cuts[2], cuts[3], "Y" * draw.randrange(4))]
        new, origin = "", []
        for k, char in enumerate(text):
            for begin, _, word in edits:
                if k == begin:
                    new += word
                    origin += [None] * len(word)
            if not any(begin <= k < end for begin, end, _ in edits):
                new += char
                origin.append(k)
        moves = Moves(edits)
        for place, k in enumerate(origin):
            if k is not None:
                assert (moves.start(k), moves.stop(k + 1)) == (place, place + 1)


def test_a_span_that_points_nowhere_is_refused(augment: Augment) -> None:
    write_jsonl(Path("in.jsonl"), [{"text": "She left.", "spans": [{"start": 5, "end": 99}]}])
    done = augment("in.jsonl")
    assert (done.code, "in.jsonl:1: field 'spans'" in done.error) == (65, True)


def test_tokens_keep_their_tags(augment: Augment) -> None:
    record = {"tokens": ["Mary", "'s", "mother", "left", "."], "tags": ["B", "O", "O", "O", "O"]}
    twin = run(augment, [record], "--mode", "twins")[0]
    assert twin["tokens"] == ["John", "'s", "father", "left", "."]
    assert twin["tags"] == record["tags"]


def test_substitution_keeps_the_number_of_records(augment: Augment) -> None:
    records = [{"id": i, "text": f"She counted {i}."} for i in range(200)]
    rows = run(augment, records, "--mode", "substitute", "--probability", "0.5")
    assert [r["id"] for r in rows] == list(range(200))
    changed = [r for r in rows if "twin_of" in r]
    assert all(r["text"].startswith("He") for r in changed)
    assert 70 < len(changed) < 130  # binomial(200, .5), beyond four standard deviations
    backwards = run(augment, records[::-1], "--mode", "substitute", "--probability", "0.5")
    assert sorted(rows, key=lambda r: r["id"]) == sorted(backwards, key=lambda r: r["id"])


def test_report_and_abstentions(augment: Augment) -> None:
    records = [{"id": "a", "text": "She is pregnant."}, {"id": "b", "text": "She left her home."}]
    rows = run(augment, records, "--report", "r.json", "--abstained", "no.jsonl")
    assert len(rows) == 3
    said = json.loads(Path("r.json").read_text())
    assert said["abstained"] == {"sexed": 1}
    assert said["abstained_examples"]["sexed"][0]["id"] == "a"
    assert said["changes"] == {"her → his": 1, "she → he": 1}
    kept = [json.loads(line) for line in Path("no.jsonl").read_text().splitlines()]
    assert kept == [
        {
            "id": "a",
            "text": "She is pregnant.",
            "twin_axis": "gender",
            "reason": "'pregnant' goes with one sex",
        }
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pair", "christian=muslim"], "--pair is for axes other than gender"),
        (["--axis", "religion", "--pair", "christian"], "write GROUP=GROUP"),
        (["--axis", "religion", "--pair", "christian=moslem"], "did you mean 'muslim'?"),
        (["--axis", "age", "--pair", "christian=muslim"], "no group of age"),
    ],
)
def test_usage(augment: Augment, options: list[str], says: str) -> None:
    write_jsonl(Path("in.jsonl"), [{"text": "x"}])
    done = augment("in.jsonl", *options)
    assert (done.code, says in done.error) == (2, True), done.stderr


def test_long_lines_emoji_and_code(augment: Augment) -> None:
    long = "she 🙂 " * 20_000 + "`she`"
    twin = run(augment, [{"text": long}], "--mode", "twins")[0]
    assert twin["text"] == "he 🙂 " * 20_000 + "`she`"


class TestEval:
    def test_counts(self, augment: Augment) -> None:
        gold = [
            {"text": "She left.", "swapped": "He left."},
            {"text": "An actress saw John.", "swapped": "An actor saw Mary."},
            {"text": "In May, it rained.", "swapped": "In May, it rained."},
            {"text": "She is pregnant.", "swapped": None},
            {"text": "He lied.", "swapped": "It lied."},
        ]
        write_jsonl(Path("gold.jsonl"), gold)
        done = augment("eval", "gold.jsonl", "--split", "all", "--json", "-q", "-o", "out")
        said = done.json()["metrics"]
        assert (said["exact"]["value"], said["exact"]["n"]) == (0.8, 5)
        assert said["exact_of_decided"]["value"] == 0.75
        assert (said["false_swaps"]["value"], said["false_swaps"]["n"]) == (0.0, 1)
        assert (said["name_consistency"]["value"], said["name_consistency"]["n"]) == (1.0, 1)
        assert said["abstained"] == {"sexed": 1}
        errors = [json.loads(line) for line in Path("out/errors.jsonl").read_text().splitlines()]
        assert [e["ours"] for e in errors] == ["She lied."]

    def test_gate(self, augment: Augment) -> None:
        write_jsonl(Path("gold.jsonl"), [{"text": "He lied.", "swapped": "It lied."}])
        done = augment("eval", "gold.jsonl", "--split", "all", "--min-exact", "0.5", "-o", "out")
        assert (done.code, Path("out/report.json").exists()) == (1, True)

    def test_both_directions_are_on_one_side(self) -> None:
        from tuneutils.tools.cf_augment.evaluate import held_out

        sides = [held_out(f"she {i}", f"he {i}") for i in range(400)]
        assert sides == [held_out(f"he {i}", f"she {i}") for i in range(400)]
        assert 60 < sum(sides) < 140  # a quarter


class TestLexicon:
    def test_a_list_of_ones_own(self, augment: Augment) -> None:
        Path("teams.tsv").write_text("term\tgroup\tslot\nred fan\tred\tfan\nblue fan\tblue\tfan\n")
        rows = run(augment, [{"text": "A red fan saw her."}], "--lexicon", "teams.tsv", "--mode", "twins")
        assert {r["twin_axis"]: r["text"] for r in rows} == {
            "gender": "A red fan saw him.",
            "teams": "A blue fan saw her.",
        }

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("term\tgruop\nx\ty\n", "teams.tsv:1: unknown column 'gruop' (did you mean 'group'?)"),
            ("term\tgroup\tflags\nx\ty\tcapitol\n", "teams.tsv:2: unknown flag 'capitol'"),
            ("term\tgroup\nx\n", "teams.tsv:2: needs a term and a group"),
        ],
    )
    def test_a_list_with_an_error(self, augment: Augment, text: str, says: str) -> None:
        Path("teams.tsv").write_text(text)
        write_jsonl(Path("in.jsonl"), [{"text": "x"}])
        done = augment("in.jsonl", "--lexicon", "teams.tsv")
        assert (done.code, says in done.error) == (65, True), done.error


def test_bytes_that_are_no_utf8_are_named(augment: Augment) -> None:
    Path("in.jsonl").write_bytes(b'{"text": "She left."}\n{"text": "caf\xe9"}\n')
    done = augment("in.jsonl", "-o", "out.jsonl")
    assert (done.code, "in.jsonl:2: not UTF-8: byte 0xe9" in done.error) == (65, True)
