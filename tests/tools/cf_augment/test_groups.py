"""The other axes: counterparts, the noun or the adjective, casing, exchange, abstention."""

from __future__ import annotations

import pytest

from tuneutils.tools.cf_augment.edits import Text
from tuneutils.tools.cf_augment.groups import GroupAxis
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.twins import Version


def swap(axis: str, text: str, *pair: str, key: bytes = b"\0" * 8) -> str | Undecided:
    one = Text(text)
    made = GroupAxis(axis, [(pair[0], pair[1])] if pair else []).versions([one], key)
    if not made:
        return text
    return one.written(made[0].edits[0]) if isinstance(made[0], Version) else made[0]


@pytest.mark.parametrize(
    ("axis", "text", "pair", "twin"),
    [
        (
            "religion", "A Christian family went to church. The Christian read the Bible; she is Christian.",
            ("christian", "jewish"),
            "A Jewish family went to synagogue. The Jew read the Torah; she is Jewish.",
        ),
        ("religion", "A Muslim met an atheist.", ("muslim", "atheist"), "An atheist met a Muslim."),
        ("religion", "Christian Bale hid an Easter egg.", ("christian", "muslim"), None),
        ("age", "An elderly man helped the young woman.", (), "A young man helped the elderly woman."),
        ("disability", "A disabled student met the blind man.", (), "A non-disabled student met the sighted man."),
        ("disability", "The feature is disabled.", (), None),
        (
            "nationality", "A German engineer from Germany speaks German with two Germans.", ("germany", "france"),
            "A French engineer from France speaks German with two French.",
        ),
        (
            "nationality", "The United States and Japan trade.", ("united-states", "japan"),
            "Japan and the United States trade.",
        ),
        ("nationality", "French fries and Danish pastry.", (), None),
        ("ethnicity", "Black tea on white paper.", (), None),
        ("ethnicity", "black people and white people", ("black", "white"), "white people and black people"),
        ("ses", "A poor family.", (), "A rich family."),
    ],
)  # fmt: skip
def test_counterparts(axis: str, text: str, pair: tuple[str, ...], twin: str | None) -> None:
    got = swap(axis, text, *pair)
    if twin is not None and "French" in twin:
        assert isinstance(got, str)
        assert got.startswith("A French engineer from France speaks German with two ")
    else:
        assert got == (twin or text)


def test_names_move_with_their_group() -> None:
    got = swap("ethnicity", "Jamal thanked Tabitha; Jamal left.", "black", "asian")
    assert isinstance(got, str)
    first, _, second, again, _ = got.replace(";", "").split()
    assert first == again
    assert len({first, second, "Jamal", "Tabitha"}) == 4


@pytest.mark.parametrize(
    ("axis", "pair", "text"),
    [
        ("religion", ("christian", "muslim"), "A Christian and two Muslims read the Quran."),
        ("ethnicity", ("black", "asian"), "Jamal thanked the black woman."),
        ("age", ("old", "young"), "An elderly man saw young people."),
        ("nationality", ("japan", "kenya"), "Two Japanese engineers left Kenya."),
    ],
)
def test_swapping_twice_gives_the_original(axis: str, pair: tuple[str, str], text: str) -> None:
    twin = swap(axis, text, *pair)
    assert isinstance(twin, str)
    assert twin != text
    assert swap(axis, twin, *pair) == text


@pytest.mark.parametrize(
    ("axis", "text", "kind"),
    [
        ("religion", "She wore a hijab.", "no counterpart"),
        ("age", "The 70-year-old elderly man.", "age in numbers"),
        ("disability", "He has cerebral palsy.", "no counterpart"),
    ],
)
def test_abstains(axis: str, text: str, kind: str) -> None:
    got = swap(axis, text)
    assert isinstance(got, Undecided)
    assert got.kind == kind


def test_the_draw_depends_on_the_record_alone() -> None:
    drawn = {swap("religion", "A Muslim left.", key=bytes([0] * 7 + [k])) for k in range(8)}
    assert len(drawn) > 3
    assert swap("religion", "A Muslim left.") == swap("religion", "A Muslim left.")
