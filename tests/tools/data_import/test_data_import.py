"""``data-import``: every kind of local file, shapes, refusals, subsets, splits and reruns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Result, write_jsonl

from tuneutils.tools.data_import.subset import side_of, smallest, split_key

Import = Callable[..., Result]


@pytest.fixture
def data_import(click_cli: Callable[..., Result], workdir: Path) -> Import:
    return lambda *args, **keywords: click_cli("data-import", *args, **keywords)


def records(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_csv_quoting(data_import: Import, workdir: Path) -> None:
    text = '\ufeffprompt,completion,id\r\n"a, ""b""","line 1\nline 2",7\r\nx,y,8\r\n'
    (workdir / "d.csv").write_bytes(text.encode())
    assert records(data_import("d.csv", "--keep", "id")) == [
        {"id": "7", "prompt": 'a, "b"', "completion": "line 1\nline 2"},
        {"id": "8", "prompt": "x", "completion": "y"},
    ]


def test_csv_with_comments_before_the_header(data_import: Import, workdir: Path) -> None:
    text = "# version=1.0, by=hand,,\n# and more\nprompt,completion\n# a heading,y\n"
    (workdir / "d.csv").write_text(text)
    assert records(data_import("d.csv")) == [{"prompt": "# a heading", "completion": "y"}]


def test_tsv_leaves_quotes_alone(data_import: Import, workdir: Path) -> None:
    (workdir / "d.tsv").write_text('prompt\tcompletion\nsay "hi"\t"hi\n')
    assert records(data_import("d.tsv")) == [{"prompt": 'say "hi"', "completion": '"hi'}]


def test_parquet(data_import: Import, workdir: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "Größe"}, {"text": "two"}]
    pq.write_table(pa.Table.from_pylist(rows), workdir / "d.parquet")
    assert records(data_import("d.parquet")) == rows


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c"]), ("file", ["a\nb\n\n\nc\n"])],
)
def test_text_units(data_import: Import, workdir: Path, unit: str, expected: list[str]) -> None:
    (workdir / "d.txt").write_text("a\nb\n\n\nc\n")
    assert records(data_import("d.txt", "--text-unit", unit)) == [{"text": t} for t in expected]


def test_json_array_under_a_key(data_import: Import, workdir: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    (workdir / "d.json").write_text(
        json.dumps({"version": 1, "data": {"x": [], "rows": rows}, "tags": ["t"]})
    )
    assert records(data_import("d.json", "--records-key", "data.rows")) == rows
    assert "did you mean 'rows'" in data_import("d.json", "--records-key", "data.row").error


def test_json_with_one_array_needs_no_key(data_import: Import, workdir: Path) -> None:
    (workdir / "d.json").write_text('{"version": 1, "rows": [{"text": "a"}]}')
    assert records(data_import("d.json")) == [{"text": "a"}]
    (workdir / "two.json").write_text('{"a": [], "b": []}')
    assert "--records-key" in data_import("two.json").error


def test_folder_and_glob(data_import: Import, workdir: Path) -> None:
    (workdir / "in").mkdir()
    write_jsonl(workdir / "in" / "b.jsonl", [{"text": "b"}])
    (workdir / "in" / "a.csv").write_text("text\na\n")
    (workdir / "in" / "README.md").write_text("not data")
    assert [r["text"] for r in records(data_import("in"))] == ["a", "b"]
    assert [r["text"] for r in records(data_import("in/*.jsonl"))] == ["b"]


def test_stdin(data_import: Import) -> None:
    assert records(
        data_import("-", "--format", "messages", stdin='{"prompt": "q", "completion": "a"}\n')
    ) == [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]


USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, {"prompt": "q", "completion": "a"}),
        ({"instruction": "q", "input": "i", "output": "a"}, {"prompt": "q\n\ni", "completion": "a"}),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["h", "r"]]},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "h"},
                          {"role": "assistant", "content": "r"}, USER, BOT]},
        ),
        (
            {"instruction": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            {"messages": [USER, BOT]},
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
             "rejected": {"from": "gpt", "value": "b"}},
            {"prompt": [USER], "chosen": [BOT], "rejected": [{"role": "assistant", "content": "b"}]},
        ),
        ({"messages": [USER, BOT], "label": 0}, {"prompt": [USER], "completion": [BOT], "label": False}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, BOT]},
            {"messages": [USER, BOT]},
        ),
        ({"question": "q", "answer": "a"}, {"prompt": "q", "completion": "a"}),
        (
            {"question": "q", "options": "A. x\nB. y", "answer": "B. y"},
            {"prompt": "q", "chosen": "y", "rejected": "x"},
        ),
        ({"prompt": "q", "completion": "a", "label": "true"}, {"prompt": "q", "completion": "a", "label": True}),
        (
            {"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "de", "score": 1.0, "x": 1},
            {"src": "a", "tgt": "b", "src_lang": "en", "tgt_lang": "de", "score": 1.0},
        ),
    ],
)  # fmt: skip
def test_shapes(data_import: Import, workdir: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    write_jsonl(workdir / "d.jsonl", [row])
    assert records(data_import("d.jsonl")) == [expected]


def test_map_and_replace(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"q": "I am {{name}}?", "a": {"best": "{{name}}"}, "n": 1}])
    args = ("--map", "prompt=q", "--map", "completion=a.best", "--replace", "{{name}}=Ada", "--keep", "n")
    assert records(data_import("d.jsonl", *args)) == [{"n": 1, "prompt": "I am Ada?", "completion": "Ada"}]
    assert (
        "field 'a.bext': absent (did you mean 'best'?)"
        in data_import("d.jsonl", "--map", "text=a.bext").error
    )


def test_placeholders_are_told_of_and_can_be_dropped(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": "I am {{name}}"}, {"text": "plain"}])
    assert "1 records hold placeholders" in data_import("d.jsonl").stderr
    done = data_import("d.jsonl", "--drop-matching", r"\{\{\w+\}\}")
    assert records(done) == [{"text": "plain"}]
    assert "1 dropped: matches --drop-matching" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.json", b'[\n {"text": "a"},\n {"text": "b"\n]', "d.json:4: not JSON"),
        ("d.json", b'[\n {"text": "a"},\n {"text": "b', "d.json:3: not JSON: Unterminated"),
        ("d.json", b'[{"text": "a"},\n 7]', "d.json:2: must be a JSON object"),
        ("d.json", b'"text"', "d.json:1: must be an array"),
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', "d.jsonl:2: not JSON"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "d.jsonl:2: not UTF-8: byte 0xff"),
        ("d.json", b'[{"text": "a"},\n{"text": "\xff"}]', "d.json:2: not UTF-8: byte 0xff at byte 11"),
        ("d.csv", b"text\nok\n\xe9t\xe9\n", "d.csv:3: not UTF-8: byte 0xe9 at byte 1"),
        ("d.csv", b"text,n\na,1\nb\n", "d.csv:3: has 1 cells, the header has 2"),
        ("d.csv", b'text\n"a\n', "d.csv:2: not CSV"),
        ("d.csv", b"text,text\na,b\n", "d.csv:1: the header names 'text' twice"),
        ("d.jsonl", b'{"txt": "a"}\n', "d.jsonl:1: no known shape: txt"),
        ("d.jsonl", b'{"text": "  "}\n', "d.jsonl:1: field 'text': is empty"),
        ("d.jsonl", b'{"conversations": [{"from": "ghost", "value": "x"}]}\n', "unknown role 'ghost'"),
        ("d.jsonl", b"", "no records"),
        ("d.json", b"[]", "no records"),
        ("d.csv", b"text\n", "no records"),
        ("d.xlsx", b"x", "unknown ending '.xlsx'"),
    ],
)
def test_bad_input_names_file_and_line(
    data_import: Import, workdir: Path, name: str, content: bytes, said: str
) -> None:
    (workdir / name).write_bytes(content)
    done = data_import(name, "-o", "out.jsonl")
    assert done.code == 65
    assert said in done.error
    assert not (workdir / "out.jsonl").exists()


def test_missing_file(data_import: Import) -> None:
    assert data_import("absent.jsonl").code == 66


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_skip_and_quarantine_lose_nothing(data_import: Import, workdir: Path, ending: str) -> None:
    content = {"jsonl": '{"text": "a"}\nnot json\n{"x": 1}\n', "csv": 'text,n\na,1\nb\n" ",2\n'}[ending]
    (workdir / f"d.{ending}").write_text(content)
    done = data_import(f"d.{ending}", "--on-error", "quarantine", "-o", "out.jsonl", "--json")
    assert (done.json()["read"], done.json()["written"]) == (3, 1)
    assert sum(done.json()["dropped"].values()) == 2
    kept = lines(workdir / "out.jsonl.quarantine.jsonl")
    assert [k["line"] for k in kept] == {"jsonl": [2, 3], "csv": [3, 4]}[ending]
    assert all(k["reason"] for k in kept)
    skipped = data_import(f"d.{ending}", "--on-error", "skip")
    assert records(skipped) == [{"text": "a"}]


def test_each_source_has_its_quarantine(data_import: Import, workdir: Path) -> None:
    for name in ("a", "b"):
        (workdir / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n{name}\n')
    data_import("a.jsonl", "b.jsonl", "--on-error", "quarantine", "-o", "out.jsonl")
    assert [k["raw"] for k in lines(workdir / "out.jsonl.quarantine.jsonl")] == ["a"]
    assert [k["raw"] for k in lines(workdir / "out.jsonl.quarantine-2.jsonl")] == ["b"]


def test_exact_duplicates_are_dropped_and_counted(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": t} for t in "abcabx"])
    done = data_import("d.jsonl")
    assert [r["text"] for r in records(done)] == list("abcx")
    assert "6 read, 4 written" in done.stderr
    assert "2 dropped: exact duplicate" in done.stderr
    assert len(records(data_import("d.jsonl", "--no-dedup"))) == 6


def test_limit_and_sample(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": f"t{i}"} for i in range(50)])
    write_jsonl(workdir / "r.jsonl", [{"text": f"t{i}"} for i in reversed(range(50))])
    assert [r["text"] for r in records(data_import("d.jsonl", "--limit", "2"))] == ["t0", "t1"]
    forth, back = (records(data_import(f, "--sample", "10")) for f in ("d.jsonl", "r.jsonl"))
    assert len(forth) == 10
    assert forth == back[::-1]
    assert records(data_import("d.jsonl", "--sample", "10", "--seed", "1")) != forth


def test_split_folder(data_import: Import, workdir: Path) -> None:
    rows = [{"prompt": f"p{i % 100}", "completion": f"c{i}"} for i in range(400)]
    write_jsonl(workdir / "d.jsonl", rows)
    done = data_import("d.jsonl", "--split", "train=0.8,test=0.2", "-o", "out", "--licence", "MIT", "--json")
    train, test = (lines(workdir / "out" / f"{n}.jsonl") for n in ("train", "test"))
    assert len(train) + len(test) == 400
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    manifest = json.loads((workdir / "out" / "artifact.json").read_text())
    assert manifest["licence"] == "MIT"
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256((workdir / "d.jsonl").read_bytes()).hexdigest()
    assert manifest["metrics"]["split"] == done.json()["split"] == {"train": len(train), "test": len(test)}


@pytest.mark.parametrize("text", ["train=0.9", "train=0.5,train=0.5", "train=x,test=0.5", "a=1.5,b=-0.5"])
def test_bad_split_is_a_usage_error(data_import: Import, workdir: Path, text: str) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": "a"}])
    assert data_import("d.jsonl", "--split", text, "-o", "out").code == 2


def test_empty_side_is_refused(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": "a"}])
    done = data_import("d.jsonl", "--split", "train=0.5,test=0.5", "-o", "out")
    assert done.code == 65
    assert "got none of 1 records" in done.error
    assert not (workdir / "out").exists()


def test_rerun_is_left_alone_and_repeat_is_byte_identical(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": f"t{i}"} for i in range(30)])
    for output in ("out.jsonl", "out"):
        assert data_import("d.jsonl", "-o", output).code == 0
    assert "up to date" in data_import("d.jsonl", "-o", "out.jsonl").stderr
    assert "up to date" in data_import("d.jsonl", "-o", "out").stderr
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    assert data_import("d.jsonl", "-o", "out.jsonl", "--limit", "3").code == 73
    for output in ("out.jsonl", "out"):
        assert data_import("d.jsonl", "-o", output, "--force").code == 0
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_output_that_is_no_stream(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": "a"}])
    assert data_import("d.jsonl", "-o", "out.csv").code == 2
    (workdir / "notes").write_text("mine")
    assert data_import("d.jsonl", "-o", "notes").code == 73
    assert data_import("d.jsonl", "-o", "/dev/null").code == 0
    assert sorted(p.name for p in workdir.iterdir()) == ["d.jsonl", "notes"]


def test_stream_to_stdout_says_its_licence(data_import: Import, workdir: Path) -> None:
    write_jsonl(workdir / "d.jsonl", [{"text": "a"}])
    done = data_import("d.jsonl", "--licence", "CC0-1.0")
    assert "licence CC0-1.0; source d.jsonl" in done.stderr
    assert "declares no licence" in data_import("d.jsonl").stderr


TEXTS = st.text(min_size=1, max_size=6)
SHARES = (("train", 0.7), ("dev", 0.1), ("test", 0.2))


@settings(max_examples=200, deadline=None)
@given(prompt=TEXTS, answers=st.lists(TEXTS, min_size=2, max_size=4), seed=st.integers(0, 9))
def test_one_prompt_stands_on_one_side(prompt: str, answers: list[str], seed: int) -> None:
    user = {"role": "user", "content": prompt}
    forms: list[dict[str, Any]] = [{"prompt": f" {prompt}\n", "completion": a} for a in answers]
    forms += [{"prompt": [user], "chosen": a, "rejected": ""} for a in answers]
    forms += [{"messages": [user, {"role": "assistant", "content": a}]} for a in answers]
    assert len({side_of(r, SHARES, seed) for r in forms}) == 1


def test_shares_are_kept_within_four_standard_errors() -> None:
    sides = [side_of({"text": f"text {i}"}, SHARES, 0) for i in range(4000)]
    for name, share in SHARES:
        error = (share * (1 - share) / 4000) ** 0.5
        assert abs(sides.count(name) / 4000 - share) < 4 * error


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, unique=True, min_size=3, max_size=20), st.randoms(use_true_random=False))
def test_a_sample_does_not_depend_on_order(texts: list[str], random: Any) -> None:
    rows = [{"text": t} for t in texts]
    mixed = rows[:]
    random.shuffle(mixed)
    taken = [{r["text"] for r in smallest(x, 2, 0)} for x in (rows, mixed)]
    assert taken[0] == taken[1]
    assert len(taken[0]) == 2


def test_split_key_of_a_conversation_is_its_opening() -> None:
    short = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Q  x"},
        {"role": "assistant", "content": "a"},
    ]
    long = [*short, {"role": "user", "content": "more"}]
    assert split_key({"messages": short}) == split_key({"messages": long}) == split_key({"prompt": "q X"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "read", "written", "made"),
    [
        ("alpaca-demo", 999, 985, "prompt-completion"),
        ("c4-demo", 300, 300, "text"),
        ("wiki-demo", 30, 30, "text"),
        ("dpo-en-demo", 300, 295, "preference"),
        ("kto-en-demo", 300, 300, "unpaired"),
        ("piqa", 1500, 1500, "preference"),
        ("crows-pairs", 1018, 1017, "test-set"),
        ("stereoset", 4229, 4229, "test-set"),
        ("bbq", 1012, 1012, "test-set"),
        ("winobias", 761, 761, "test-set"),
    ],
)
def test_builtins(data_import: Import, name: str, read: int, written: int, made: str) -> None:
    done = data_import(f"builtin:{name}", "-o", "out.jsonl", "--json").json()
    assert (done["read"], done["written"], done["formats"]) == (read, written, {made: written})
