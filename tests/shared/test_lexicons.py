"""Lexicons: what ships is well formed and licensed; what a user writes wrong is named by its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneutils.shared import lexicons
from tuneutils.shared.errors import ToolError

SHIPPED = [(axis, language) for axis, languages in lexicons.available().items() for language in languages]


@pytest.mark.parametrize(("axis", "language"), SHIPPED)
def test_every_list_has_groups_a_licence_and_a_source(axis: str, language: str) -> None:
    found = lexicons.load(axis, language)
    assert len(found.groups) >= 2
    assert found.licence != "unknown"
    assert found.source
    assert all(t.text == t.text.lower().strip() for t in found.terms)


def test_the_issue_s_axes_are_there() -> None:
    assert set(lexicons.available()) == {
        *("age", "disability", "ethnicity", "gender", "nationality", "orientation", "religion", "ses")
    }


def test_no_text_belongs_to_two_groups_of_an_axis() -> None:
    for axis, language in SHIPPED:
        for text, terms in lexicons.load(axis, language).by_text.items():
            assert len({t.group for t in terms}) == 1, (axis, language, text)


def test_pronouns_and_their_slots() -> None:
    gender = lexicons.load("gender")
    assert {t.slot for t in gender.by_text["her"]} == {"object", "possessive"}
    swapped = {t.slot: gender.counterparts(t)["male"].text for t in gender.by_text["her"]}
    assert swapped == {"object": "him", "possessive": "his"}
    (hers,) = gender.by_text["hers"]
    assert gender.counterparts(hers)["male"].text == "his"


@pytest.mark.parametrize(
    ("male", "female"), [("king", "queen"), ("uncle", "aunt"), ("waiter", "waitress"), ("wizard", "witch")]
)
def test_gendered_nouns_are_each_other_s_counterparts(male: str, female: str) -> None:
    gender = lexicons.load("gender")
    assert gender.counterparts(gender.by_text[male][0])["female"].text == female
    assert gender.counterparts(gender.by_text[female][0])["male"].text == male


def test_one_slot_across_many_groups() -> None:
    religion = lexicons.load("religion")
    church = religion.by_text["church"][0]
    places = {g: t.text for g, t in religion.counterparts(church).items()}
    assert (places["muslim"], places["jewish"]) == ("mosque", "synagogue")


def test_names_have_frequency_share_and_warnings() -> None:
    names = {n.text: n for n in lexicons.load_names()}
    assert names["mary"].female_share > 0.9 > 0.1 > names["john"].female_share
    assert "word" in names["mark"].flags
    assert "word" in names["grace"].flags
    assert {"asian", "black", "hispanic", "white"} == {n.ethnicity for n in names.values()} - {""}
    assert set(lexicons.names_lexicon("gender").groups) == {"female", "male"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("term\tgroup\nhe\n", ":2: needs a term and a group"),
        ("term\tgruop\nhe\tmale\n", ":1: unknown column 'gruop' (did you mean 'group'?)"),
        ("term\tgroup\tweight\nhe\tmale\theavy\n", ":2: weight must be a number, is 'heavy'"),
        ("term\tgroup\tweight\nhe\tmale\tnan\n", ":2: weight must be finite"),
        ("term\tgroup\tflags\nhe\tmale\tcaptial\n", ":2: unknown flag 'captial' (did you mean 'capital'?)"),
        ("term\tgroup\nhe\tmale\tx\n", ":2: 3 cells under 2 columns"),
        ("", "no terms"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    at = tmp_path / "mine.tsv"
    at.write_text(text)
    with pytest.raises(ToolError) as caught:
        lexicons.load_file(at)
    assert says in str(caught.value)


def test_a_list_of_one_s_own(tmp_path: Path) -> None:
    at = tmp_path / "team.tsv"
    at.write_text("# licence: CC0-1.0\nterm\tgroup\nRed Team\tred\nblue team\tblue\n")
    found = lexicons.load_file(at)
    assert (found.name, found.groups, found.licence) == ("team", ("red", "blue"), "CC0-1.0")
    assert found.terms[0].text == "red team"


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ToolError, match="did you mean 'gender'"):
        lexicons.load("gendre")
