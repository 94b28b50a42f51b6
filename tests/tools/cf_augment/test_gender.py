"""The gender axis: gold swaps, traps, agreement, and what every swap must keep."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneutils.shared.errors import ToolError
from tuneutils.tools.cf_augment.agreement import base
from tuneutils.tools.cf_augment.edits import Text
from tuneutils.tools.cf_augment.gender import GenderOptions
from tuneutils.tools.cf_augment.gender_axis import GenderAxis
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.twins import Version

WINOBIAS = Path(__file__).parents[4] / "shared" / "data" / "winobias_gold_swaps.jsonl"
TRAPS = [json.loads(line) for line in Path(__file__).with_name("gold_traps.jsonl").read_text().splitlines()]


def swap(text: str, **options: str) -> str | Undecided:
    """The twin of a text, the text itself where nothing changes, or why there is none."""
    one = Text(text)
    made = GenderAxis(GenderOptions(**options)).versions([one], b"")  # type: ignore[arg-type]
    if not made:
        return text
    return one.written(made[0].edits[0]) if isinstance(made[0], Version) else made[0]


def each(text: str) -> dict[str, str]:
    """The twin for each person by label; persons without one are left out."""
    one = Text(text)
    made = GenderAxis(GenderOptions(persons="each")).versions([one], b"")
    return {v.name: one.written(v.edits[0]) for v in made if isinstance(v, Version)}


@pytest.mark.parametrize("row", TRAPS, ids=lambda row: row["text"][:30])
def test_traps(row: dict[str, str | None]) -> None:
    got = swap(str(row["text"]))
    assert got == row["swapped"] if row["swapped"] is not None else isinstance(got, Undecided)


@pytest.mark.parametrize(
    ("text", "twin"),
    [
        ("Mary lost her keys.", "John lost his keys."),
        ("MARY and her mother", "JOHN and his father"),
        ("She is an actress.", "He is an actor."),
        ("a man, an uncle", "a woman, an aunt"),
        ("the heroine; a hero", "the hero; a heroine"),
    ],
)
def test_forms(text: str, twin: str) -> None:
    assert swap(text) == twin


@pytest.mark.parametrize("text", [row["text"] for row in TRAPS if row["swapped"] is not None])
def test_swapping_twice_gives_the_original(text: str) -> None:
    twin = swap(text)
    assert isinstance(twin, str)
    back = swap(twin)
    # An or a, Mr. or Mrs.: what several words became one cannot be undone.
    assert back == text or "Brown" in text or isinstance(back, Undecided)


@pytest.mark.parametrize(
    ("text", "neutral"),
    [
        ("She walks home and sings.", "They walk home and sing."),
        ("He always carries his bag.", "They always carry their bag."),
        ("She's been here; he's happy.", "They've been here; they're happy."),
        ("Isn't she late? Does he know?", "Aren't they late? Do they know?"),
        ("He was late and has left.", "They were late and have left."),
        ("Her mother saw hers.", "Their parent saw theirs."),
        ("HE WAS LATE.", "THEY WERE LATE."),
        ("Grandma told the fireman he is a hero.", "Grandparent told the firefighter they are a hero."),
        ("He said she could.", "They said they could."),
    ],
)
def test_verbs_agree_with_singular_they(text: str, neutral: str) -> None:
    assert swap(text, to="neutral") == neutral


@pytest.mark.parametrize("rest", ["knew it was too late", "was already dead"])
@pytest.mark.parametrize("patient", ["the passenger", "someone"])
def test_winogender_schemas(rest: str, patient: str) -> None:
    """Rudinger et al. 2018, figure 1: the same sentence with each of the three pronouns."""
    she, he, they = (
        f"The paramedic performed CPR on {patient} even though {pronoun} {verbs}."
        for pronoun, verbs in (
            ("she", rest),
            ("he", rest),
            ("they", rest.replace("was already", "were already")),
        )
    )
    assert (swap(she), swap(he)) == (he, she)
    assert (swap(she, to="neutral"), swap(he, to="neutral")) == (they, they)


@pytest.mark.parametrize("text", ["He likes cats and dogs.", "He's finished."])
def test_undecided_agreement_abstains(text: str) -> None:
    assert isinstance(swap(text, to="neutral"), Undecided)


@pytest.mark.parametrize(
    ("verb", "plural"),
    [  # Quirk et al. 1985, section 3.5: the third person singular's spellings
        ("passes", "pass"), ("buzzes", "buzz"), ("catches", "catch"), ("pushes", "push"), ("fixes", "fix"),
        ("carries", "carry"), ("plays", "play"), ("goes", "go"), ("has", "have"), ("lies", "lie"), ("uses", "use"),
        ("walked", None), ("can", None), ("always", None),
    ],
)  # fmt: skip
def test_base(verb: str, plural: str | None) -> None:
    assert base(verb) == plural


def test_one_way_leaves_the_other_gender() -> None:
    assert swap("He met her.", to="female") == "She met her."
    assert swap("He met her.", to="male") == "He met him."


def test_nobody_gets_the_name_of_another() -> None:
    text = swap("John and Mary and Patricia met.", to="female")
    assert isinstance(text, str)
    names = text.replace(" and", "").split()[:3]
    assert len(set(names)) == 3
    assert names[1:] == ["Mary", "Patricia"]


class TestEachPerson:
    def test_another_person_stays(self) -> None:
        made = each("John told Mary that he likes her.")
        assert made["john"].endswith("told Mary that she likes her.")
        assert made["mary"].startswith("John told ")
        assert made["mary"].endswith("that he likes him.")

    def test_name_title_surname_and_pronouns_change_together(self) -> None:
        made = each("Mary Smith is a nurse. Mrs. Smith said she loves her job. Her husband does not.")
        assert made["mary"] == "John Smith is a nurse. Mr. Smith said he loves his job. His husband does not."
        assert made["husband"].endswith("Her wife does not.")

    @pytest.mark.parametrize(
        "text",
        [
            "John met his brother. He smiled.",
            "The nurse told John that he was late.",
            "Emily and Anna met. Emily gave Anna her book.",
        ],
    )
    def test_abstains_where_two_are_possible(self, text: str) -> None:
        assert each(text) == {}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("heris HERm.,'\n\"`😀é-/"), max_size=60))
def test_any_text_goes_through(text: str) -> None:
    got = swap(text)
    assert isinstance(got, (str, Undecided))
    if isinstance(got, str):
        assert got.count("\n") == text.count("\n")


class TestSpacy:
    def test_absent(self) -> None:
        if importlib.util.find_spec("spacy"):
            pytest.skip("spaCy is installed")
        with pytest.raises(ToolError, match=r"pip install 'tuneutils\[spacy\]'"):
            GenderAxis(GenderOptions(tagger="spacy"))

    def test_decides_her_and_his(self) -> None:
        pytest.importorskip("spacy")
        assert swap("She gave her book to her. The book is his.", tagger="spacy") == (
            "He gave his book to him. The book is hers."
        )


@pytest.mark.skipif(not WINOBIAS.is_file(), reason="needs the gold swaps beside the checkout")
def test_winobias_swaps() -> None:
    """The issue's goal on gold that this project did not write; abstentions count as errors."""
    rows = [json.loads(line) for line in WINOBIAS.read_text().splitlines()]
    exact = sum(str(swap(row["text"])).lower() == row["swapped"].lower() for row in rows)
    assert exact / len(rows) >= 0.985
