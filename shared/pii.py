"""Personal data in text: found by patterns, confirmed by a check digit or range where there is one; masked.

========  =============================================================================================
kind      what counts
========  =============================================================================================
email     ``local@domain.tld``
iban      ISO 13616: country, two check digits, 11 to 30 more; mod 97 = 1
card      13 to 19 digits, in groups or not, that begin as card numbers do; Luhn (ISO/IEC 7812-1)
ssn       a US social security number ``AAA-GG-SSSS`` of a range that is given out
phone     ``+`` and 8 to 15 digits (E.164), or ten digits in the groups of North America
ip        an IPv4 address that is neither private, loopback, documentation nor reserved
========  =============================================================================================

Names and addresses of people are not found: patterns cannot tell them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

_IBAN_TABLE = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 "
    "DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 "
    "IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 "
    "MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 "
    "SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
#: Length of an IBAN by country (SWIFT IBAN Registry).
IBAN_LENGTHS = {e[:2]: int(e[2:]) for e in _IBAN_TABLE.split(" ")}

KINDS = ("email", "iban", "card", "ssn", "phone", "ip")


@dataclass(frozen=True)
class Span:
    """One find: ``text[start:end]`` is of that kind."""

    kind: str
    start: int
    end: int


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if i % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban(text: str) -> bool:
    """Whether an IBAN has its country's length and the right check digits (ISO 13616: mod 97 is 1)."""
    compact = re.sub(r"\s", "", text).upper()
    moved = compact[4:] + compact[:4]
    return (
        IBAN_LENGTHS.get(compact[:2]) == len(compact)
        and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1
    )


def _card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if text.startswith("+"):
        return 8 <= len(digits) <= 15
    return len(digits.removeprefix("1")) == 10


def _ip(text: str) -> bool:
    import ipaddress

    try:
        return ipaddress.IPv4Address(text).is_global
    except ValueError:
        return False


_CHECKED: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (
        re.compile(
            r"(?<![\w.+%/-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-])"
        ),
        lambda _: True,
    ),
    "iban": (re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b"), iban),
    "card": (re.compile(r"(?<![\w.+-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|\.\d)"), _card),
    "ssn": (
        re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        lambda _: True,
    ),
    "phone": (
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .()-]{0,2}(?:\d[ .()/-]{0,2}){6,13}\d"
            r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4})(?![\w-]|\.\d)"
        ),
        _phone,
    ),
    "ip": (re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)"), _ip),
}
#: A character without which no text of the kind can be: most texts are then not searched.
_NEEDS: dict[str, re.Pattern[str]] = {
    "email": re.compile("@"),
    "iban": re.compile(r"[A-Z]{2}\d{2}"),
    "card": re.compile(r"\d{4}[ -]?\d{2}"),
    "ssn": re.compile(r"-\d{2}-\d{4}"),
    "phone": re.compile(r"\+\d|\d[-.]\d{4}"),
    "ip": re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d"),
}
#: Every find has one of these; it starts with one set of characters, which one quick pass looks for.
_ANY = re.compile(
    r"[@0-9](?:(?<=@)|(?<=[A-Z]{2}[0-9])[0-9]|(?:[ .()/-]{0,3}[0-9]){6}|(?:[0-9]{0,2}\.[0-9]{1,3}){3})"
)


def find(text: str, kinds: Sequence[str] = KINDS) -> list[Span]:
    """What is personal in a text, in order, without overlap: what starts first stays, then the first kind.

    Args:
        kinds: some of ``KINDS``.
    """
    found = sorted((s for kind in kinds for s in _search(text, kind)), key=lambda span: span.start)
    kept: list[Span] = []
    for span in found:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _search(text: str, kind: str) -> Iterator[Span]:
    pattern, valid = _CHECKED[kind]
    if not _NEEDS[kind].search(text):
        return
    for match in pattern.finditer(text):
        end = _iban_end(text, match.start(), match.end()) if kind == "iban" else match.end()
        if valid(text[match.start() : end]):
            yield Span(kind, match.start(), end)


def _iban_end(text: str, start: int, end: int) -> int:
    """Where an IBAN ends by its country's length: capitals after it may look like more of it."""
    left = IBAN_LENGTHS.get(text[start : start + 2], 0)
    for at in range(start, end):
        left -= text[at] != " "
        if not left:
            return at + 1 if at + 1 == end or text[at + 1] == " " else end
    return end


def mask(text: str, kinds: Sequence[str] = KINDS, *, form: str = "[{kind}]") -> tuple[str, Counter[str]]:
    """The text with each find replaced by ``form``, and how many of each kind there were.

    Args:
        form: what stands in place of a find; ``{kind}`` is its kind in capitals.
    """
    pieces: list[str] = []
    counts: Counter[str] = Counter()
    last = 0
    for start, end in _lines(text):
        for span in find(text[start:end], kinds):
            pieces += [text[last : start + span.start], form.format(kind=span.kind.upper())]
            last = start + span.end
            counts[span.kind] += 1
    return ("".join([*pieces, text[last:]]) if counts else text), counts


def _lines(text: str) -> Iterator[tuple[int, int]]:
    """The lines that may hold a find, which never runs over the end of one."""
    end = -1
    for match in _ANY.finditer(text):
        if match.start() >= end:
            start = text.rfind("\n", 0, match.start()) + 1
            end = text.find("\n", match.end())
            end = len(text) if end < 0 else end
            yield start, end


#: What stands at the end of a text and could yet grow into personal data.
_UNFINISHED = re.compile(
    r"(?:[A-Z]{1,2}\d{0,2}(?:[ -]?[A-Z0-9]){0,30} ?|[+(]?[\d(][\d ()./-]{0,40}|[+(]|[\w.+%-]+(?:@[\w.-]*)?)\Z"
)


class Masker:
    """Masks personal data in a text that comes in pieces, holding back what could still grow into some."""

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        self._kinds = kinds
        self._text = ""
        self._given = 0

    def feed(self, piece: str) -> str:
        """Take a piece; gives the masked text that is now final."""
        self._text += piece
        unfinished = _UNFINISHED.search(self._text, max(self._given, len(self._text) - 100))
        return self._give(unfinished.start() if unfinished else len(self._text))

    def finish(self) -> str:
        """What was held back, masked."""
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        spans = [s for s in find(self._text, self._kinds) if s.end > self._given]
        for span in spans:
            if span.start < end < span.end:
                end = span.start
        made, done = [], self._given
        for span in spans:
            if self._given <= span.start and span.end <= end:
                made += [self._text[done : span.start], f"[{span.kind.upper()}]"]
                done = span.end
        made.append(self._text[done:end])
        self._given = max(end, self._given)
        return "".join(made)
