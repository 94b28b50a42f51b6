"""Personal data: published examples of each number, and numbers that only look like one."""

from __future__ import annotations

import itertools

import pytest

from tuneutils.shared.pii import KINDS, find, iban, luhn, mask


@pytest.mark.parametrize("number", ["79927398713", "4111111111111111", "378282246310005", "6011111111111117"])
def test_luhn_of_published_numbers(number: str) -> None:
    """ISO/IEC 7812-1's common worked example, and the card schemes' test numbers."""
    assert luhn(number)
    for wrong in range(10):
        assert luhn(number[:-1] + str(wrong)) == (wrong == int(number[-1]))


@pytest.mark.parametrize(
    "number",
    [
        "GB82 WEST 1234 5698 7654 32",
        "DE89370400440532013000",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NO9386011117947",
    ],
)
def test_iban_of_the_registry(number: str) -> None:
    assert iban(number)
    assert [s.kind for s in find(f"Pay to {number}.")] == ["iban"]
    assert not iban(number.replace("9", "8", 1) if "9" in number else number.replace("4", "5", 1))


#: Of the SWIFT IBAN registry.
IBANS = [
    "AD12 0001 2030 2003 5910 0100",
    "AT61 1904 3002 3457 3201",
    "BE68 5390 0754 7034",
    "CH93 0076 2011 6238 5295 7",
    "DE89 3704 0044 0532 0130 00",
    "DK50 0040 0440 1162 43",
    "ES91 2100 0418 4502 0005 1332",
    "FR14 2004 1010 0505 0001 3M02 606",
    "GB29 NWBK 6016 1331 9268 19",
    "IT60 X054 2811 1010 0000 0123 456",
    "MT84 MALT 0110 0001 2345 MTLC AST0 01S",
    "NL91 ABNA 0417 1643 00",
    "NO93 8601 1117 947",
    "SA03 8000 0000 6080 1016 7519",
    "SE45 5000 0000 0583 9825 7466",
    "TR33 0006 1005 1978 6457 8413 26",
]


@pytest.mark.parametrize("number", IBANS)
def test_an_iban_ends_where_its_country_says(number: str) -> None:
    for shown in (number, number.replace(" ", "")):
        assert mask(f"PAY {shown} NOW OR IN 2 DAYS")[0] == "PAY [IBAN] NOW OR IN 2 DAYS"
        assert mask(f"IBAN {shown}.")[0] == "IBAN [IBAN]."
    assert not iban(number[:-1])
    compact = number.replace(" ", "")
    for i in range(4, len(compact) - 1):  # mod 97 catches every transposition of neighbours
        if compact[i] != compact[i + 1]:
            assert not iban(compact[:i] + compact[i + 1] + compact[i] + compact[i + 2 :])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "ada.lovelace+math@mail.example.co.uk"),
        ("card", "4111 1111 1111 1111"),
        ("card", "5555-5555-5555-4444"),
        ("ssn", "219-09-9999"),
        ("phone", "+44 20 7946 0958"),
        ("phone", "(212) 555-0142"),
        ("phone", "212-555-0142"),
        ("phone", "+49 (0)30 123456"),
        ("ip", "8.8.8.8"),
    ],
)
def test_each_kind_is_masked(kind: str, text: str) -> None:
    masked, counts = mask(f"It is {text}, he said.")
    assert masked == f"It is [{kind.upper()}], he said."
    assert dict(counts) == {kind: 1}


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112 fails Luhn",
        "version 3.11.4 of 2023-06-06",
        "192.168.1.1 and 127.0.0.1 and 10.0.0.1 are private",
        "1.2.3.4.5 is a section",
        "ISBN 978-0-13-468599-1",
        "pi is 3.14159265358979323846",
        "@property and user@localhost",
        "000-12-3456 and 666-12-3456 and 900-12-3456 are never given out",
        "the years 1914-1918 and 1939-1945",
        "0x41111111 1e10 1234567890",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert mask(text) == (text, {})


def test_only_the_kinds_asked_for() -> None:
    text = "a@b.org or +44 20 7946 0958"
    assert mask(text, ["email"])[0] == "[EMAIL] or +44 20 7946 0958"
    assert mask(text, [])[0] == text
    assert mask(text, form="<{kind}>")[0] == "<EMAIL> or <PHONE>"
    assert set(KINDS) >= {s.kind for s in find(text)}


def test_finds_lie_in_order_without_overlap() -> None:
    text = "x@y.de " * 3000 + "+44 20 7946 0958 " * 3000
    spans = find(text)
    assert len(spans) == 6000
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
