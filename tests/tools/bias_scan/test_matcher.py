"""Which mentions are found: traps of words that name nobody, phrases, casing, encodings."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneutils.shared.lexicons import Lexicon, Term, load, load_file
from tuneutils.tools.bias_scan.matcher import Matcher
from tuneutils.tools.bias_scan.params import DataParams
from tuneutils.tools.bias_scan.scan_data import lexicons_of
from tuneutils.tools.bias_scan.texts import text_of

TRAPS = [json.loads(line) for line in Path(__file__).with_name("traps.jsonl").read_text().splitlines()]


def lexicon(name: str = "x", **terms: str) -> Lexicon:
    """A lexicon of ``term=group``; ``_`` in a term is a blank."""
    made = tuple(Term(text.replace("_", " "), group) for text, group in terms.items())
    return Lexicon(name, "en", made, "MIT", "test")


def found(matcher: Matcher, *texts: str) -> list[tuple[int, str, str]]:
    """Text number, term and group of each mention."""
    got = matcher.find(texts)
    rows = got.rows[got.row_of[got.start]].tolist()
    return sorted(
        (row, matcher.terms[t], matcher.groups[g][1]) for row, t, g in zip(rows, got.term, got.group)
    )


@pytest.fixture(scope="module")
def shipped() -> Matcher:
    return Matcher(lexicons_of(DataParams()))


@pytest.mark.parametrize("row", TRAPS, ids=lambda row: row["text"][:30])
def test_traps(row: dict, shipped: Matcher) -> None:
    text = text_of({"text": row["text"] or "."})
    got = shipped.find([text])
    names = [f"{shipped.axes[axis]}.{group}" for axis, group in (shipped.groups[g] for g in got.group)]
    assert Counter(names) == row["mentions"]


def test_shipped_lists_have_no_clash(shipped: Matcher) -> None:
    assert shipped.clashes == []


def test_what_is_passed_over_is_counted(shipped: Matcher) -> None:
    got = shipped.find(["Mark the page. Hope is a thing. China is far; Florence too."])
    passed = dict(zip(shipped.axes, got.ambiguous.tolist()))
    assert len(got.group) == 0
    # Mark, Hope, and Florence (a place) as names; China at a sentence's start.
    assert (passed["gender"], passed["nationality"]) == (3, 1)


def test_the_longer_term_stands_and_a_clash_is_named() -> None:
    matcher = Matcher([lexicon(man="male", gay_man="gay", man_kind="-")])
    assert found(matcher, "a gay man, a man kind, a man") == [(0, "gay man", "gay"), (0, "man", "male")]
    twice = Lexicon("x", "en", (Term("kin", "a"), Term("kin", "b"), Term("k", "b")), "MIT", "test")
    assert Matcher([twice]).clashes == ["x: kin (a, b)"]


def test_axes_do_not_hide_each_other() -> None:
    matcher = Matcher([lexicon("a", old_man="old"), lexicon("b", man="male")])
    assert found(matcher, "The old man.") == [(0, "man", "male"), (0, "old man", "old")]


def test_texts_do_not_run_into_each_other() -> None:
    matcher = Matcher([lexicon(old_man="old")])
    assert found(matcher, "old", "man", "old man", "", "x\x00old man\x00") == [
        (2, "old man", "old"),
        (4, "old man", "old"),
    ]


@pytest.mark.parametrize("language", ["de", "es", "fr", "it", "ru"])
def test_other_scripts_and_cases(language: str) -> None:
    terms = load("gender", language).terms
    matcher = Matcher([load("gender", language)])
    plain = [t for t in terms if " " not in t.text and "-" not in t.text and "'" not in t.text][:50]
    for written in (str.lower, str.upper, str.capitalize):
        same = [t for t in plain if len(written(t.text).encode()) == len(t.text.encode())]
        got = found(matcher, *(f"«{written(t.text)}»!" for t in same))
        assert [(row, group) for row, _, group in got] == [(i, t.group) for i, t in enumerate(same)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from(list("heHE sß İ\x00'東👩\n-_.")), max_size=30), max_size=5))
def test_agrees_with_a_regular_expression(texts: list[str]) -> None:
    matcher = Matcher([lexicon(he="m", she="f", he_she="both")])
    words = re.compile(r"(?<![\w東])(he[\n ]she|he|she)(?![\w東])", re.IGNORECASE)
    # Python's \w knows letters alone; what the matcher takes for a word besides is not in this alphabet.
    want = []
    for row, text in enumerate(texts):
        for m in words.finditer(text.replace("\x00", " ").replace("👩", " ")):
            term = re.sub(r"\s", " ", m[0].lower())
            want.append((row, term, {"he": "m", "she": "f"}.get(term, "both")))
    assert found(matcher, *texts) == sorted(want)


def test_a_lexicon_with_an_error_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "diet.en.tsv"
    path.write_text("# licence: MIT\nterm\tgroup\tflags\nvegan\tplants\nsteak eater\tmeat\tcapitol\n")
    with pytest.raises(
        Exception, match=r"diet\.en\.tsv:4: unknown flag 'capitol' \(did you mean 'capital'\?\)"
    ):
        load_file(path)
