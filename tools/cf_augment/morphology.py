"""Gender in Spanish and French: a noun changes, and what agrees with it: *La abogada famosa está cansada*."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from tuneutils.shared.lexicons import load
from tuneutils.tools.cf_augment.apertium import Apertium, Unit
from tuneutils.tools.cf_augment.edits import Edit, Text
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.scan import protected, starts
from tuneutils.tools.cf_augment.twins import Version

_OTHER = {"m": "f", "f": "m"}
_TO = {"female": "f", "male": "m"}
_COPULAS = frozenset(
    (
        "ser", "estar", "parecer", "quedar", "volver",
        "être", "sembler", "paraître", "devenir", "rester", "demeurer",
    )
)  # fmt: skip
#: Endings of nouns with one form for both genders that name people.
_PERSONAL = ("ista", "iste", "ante", "ente", "atra", "iatre", "ogue", "aire", "nauta", "naute")
#: Masculine forms that stand before a vowel only; the generator gives them everywhere.
_PLAIN = {"bel": "beau", "nouvel": "nouveau", "vieil": "vieux"}
_BEFORE_VOWEL = re.compile(r"\b(?:bel|nouvel|vieil)\b(?!\s+[aeiouyhàâéèêëîïôœûü])", re.IGNORECASE)
_IMPERSONAL = frozenset(["falloir", "pleuvoir", "neiger"])


class MorphologyAxis:
    """The gender axis for a language that marks it on determiners, adjectives and participles."""

    name = "gender"

    def __init__(self, language: str, to: str) -> None:
        self.language, self.to = language, to
        self._apertium = Apertium(language)

    def versions(self, found: Sequence[Text], _key: bytes, /) -> list[Version | Undecided]:
        try:
            edits = [self._edits(text) for text in found]
        except Undecided as why:
            return [why]
        return [Version("", edits)] if any(edits) else []

    def _edits(self, text: Text) -> list[Edit]:
        units = self._apertium.analyse(text.source)
        spans = protected(text.source)
        changed: dict[int, Unit] = {}
        heads: dict[int, str] = {}  # place → its new gender
        for k, unit in enumerate(units):
            if any(a < unit.end and unit.start < b for a, b in spans):
                continue
            new = self._head(units, k)
            if new is not None:
                heads[k] = _gender(new) if _gender(new) in _OTHER else _OTHER[self._shown(units, k)]
                changed[k] = new
                self._phrase(units, k, heads[k], changed)
        if not heads:
            return []
        self._refuse(units)
        for k, unit in enumerate(units):
            if unit.lemma.lower() not in _COPULAS:
                continue
            subject = _subject(units, k)
            if subject in heads:
                self._predicate(units, k, heads[subject], changed)
            elif subject >= 0 and (said := _said(units, k)) in heads:
                raise Undecided("agreement", f"{units[said].surface!r} is said of {units[subject].surface!r}")
        return self._written(text, units, changed)

    def _head(self, units: Sequence[Unit], k: int) -> Unit | None:
        """A noun or subject pronoun that names a person, as it becomes; None for others."""
        unit = units[k]
        gender = _gender(unit)
        if "n" not in unit.tags[:1] and unit.tags[:2] != ("prn", "tn"):
            return None
        if unit.tags[:1] == ("prn",):
            return self._pronoun(units, k)
        if gender == "mf":
            return self._common(units, k)
        if gender not in _OTHER or not self._goes(gender):
            return None
        male, female = pairs(self.language)
        side = male if gender == "m" else female
        low = unit.lemma.lower()
        if low in side:
            new = side[low]
            cased = new.capitalize() if unit.lemma[:1].isupper() else new
            made = self._fitting(cased, unit, _OTHER[gender])
        else:
            made = unit.with_gender(_OTHER[gender])
        try:
            form = self._apertium.generate(made.code)
        except Undecided:
            if low in side or unit.surface.lower() in _people(self.language):
                raise
            return None
        return made if form.lower() != unit.surface.lower() else None

    def _fitting(self, lemma: str, unit: Unit, gender: str) -> Unit:
        """A noun listed as a pair, under the lemma that the generator knows it by: *mujer*, *nuera*."""
        for tags in (unit.with_gender(gender).tags, unit.tags):
            made = Unit(unit.start, unit.end, unit.surface, lemma, tags)
            try:
                self._apertium.generate(made.code)
            except Undecided:
                continue
            return made
        return Unit(unit.start, unit.end, unit.surface, unit.lemma, unit.with_gender(gender).tags)

    def _goes(self, gender: str) -> bool:
        return self.to == "swap" or _TO.get(self.to) != gender

    def _pronoun(self, units: Sequence[Unit], k: int) -> Unit | None:
        unit = units[k]
        gender = _gender(unit)
        if gender not in _OTHER or not self._goes(gender):
            return None
        after = units[k + 1] if k + 1 < len(units) else None
        if after is not None and (after.lemma in _IMPERSONAL or after.surface.lower() == "y"):
            return None
        if any(
            u.tags[:1] == ("n",) and _gender(u) == gender and self._head(units, i) is None
            for i, u in enumerate(units[:k])
        ):
            raise Undecided("pronoun", f"{unit.surface!r} may be a thing")
        return unit.with_gender(_OTHER[gender])

    def _common(self, units: Sequence[Unit], k: int) -> Unit | None:
        """*el artista*: the noun has one form, its determiner shows the gender."""
        unit = units[k]
        if not unit.lemma.lower().endswith(_PERSONAL):
            return None
        gender = self._shown(units, k)
        return unit if gender in _OTHER and self._goes(gender) else None

    def _shown(self, units: Sequence[Unit], k: int) -> str:
        """The gender of the determiner in front of a noun, adjectives between them skipped."""
        i = k - 1
        while i >= 0 and units[i].tags[:1] == ("adj",):
            i -= 1
        return _gender(units[i]) if i >= 0 and units[i].tags[:1] == ("det",) else ""

    def _phrase(self, units: Sequence[Unit], k: int, gender: str, changed: dict[int, Unit]) -> None:
        """Determiners and adjectives in front of the noun, adjectives and participles behind it."""
        number = _number(units[k])
        for step in (-1, 1):
            i = k + step
            while 0 <= i < len(units) and i not in changed:
                unit = units[i]
                kind = unit.tags[:1]
                agrees = _number(unit) in (number, "sp") and _gender(unit) in ("m", "f", "mf")
                if kind == ("det",) and step < 0 and agrees:
                    if _gender(unit) != "mf" or (number == "sg" and unit.surface.endswith(("'", "’"))):
                        changed[i] = unit.with_gender(gender)
                elif (kind == ("adj",) or (step > 0 and "pp" in unit.tags)) and agrees:
                    if _gender(unit) != "mf":
                        changed[i] = self._adjective(unit, gender, number)
                elif not kind and step > 0 and unit.surface.islower():
                    raise Undecided("agreement", f"Apertium does not know {unit.surface!r}")
                elif kind not in (("adv",), ("preadv",), ("num",), ("adj",)):
                    break
                i += step

    def _predicate(self, units: Sequence[Unit], k: int, gender: str, changed: dict[int, Unit]) -> None:
        for i in range(k + 1, len(units)):
            unit = units[i]
            kind = unit.tags[:1]
            if not unit.tags:
                raise Undecided("agreement", f"Apertium does not know {unit.surface!r}")
            if kind == ("adj",) or "pp" in unit.tags:
                if _gender(unit) in _OTHER:
                    changed[i] = self._adjective(unit, gender, "sg")
            elif kind not in (("adv",), ("preadv",), ("cnjcoo",)):
                break

    def _adjective(self, unit: Unit, gender: str, number: str) -> Unit:
        """*vieux* serves both numbers, *vieille* one: the noun's."""
        made = unit.with_gender(gender)
        if "sp" in made.tags:
            made = replace(made, tags=tuple(number if t == "sp" else t for t in made.tags))
        return made

    def _refuse(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if unit.tags[:2] == ("np", "ant"):
                raise Undecided("name", f"{unit.surface!r}: first names are not swapped in {self.language}")
            if unit.tags[:2] == ("prn", "pro") and _gender(unit) in _OTHER:
                raise Undecided("pronoun", f"{unit.surface!r} may be a thing")

    def _written(self, text: Text, units: Sequence[Unit], changed: dict[int, Unit]) -> list[Edit]:
        """One edit for each run of changed units, prepositions that contract and elided words included."""
        at = starts(text.words, text.seps)
        edits = []
        k = 0
        while k < len(units):
            if k not in changed:
                k += 1
                continue
            first = k - 1 if k and units[k - 1].tags == ("pr",) and changed[k].tags[:1] == ("det",) else k
            last = k
            while last + 1 < len(units) and (last + 1 in changed or units[last].surface.endswith(("'", "’"))):
                last += 1
            coded = ""
            for i in range(first, last + 1):
                coded += changed.get(i, units[i]).code
                if i < last:
                    coded += text.source[units[i].end : units[i + 1].start] or " "
            begin = bisect_left(at, units[first].start)
            end = bisect_left(at, units[last].end)
            new = self._apertium.generate(coded)
            if self.language == "fr":
                new = new.replace("soeur", "sœur")
                new = _BEFORE_VOWEL.sub(lambda m: _PLAIN[m[0].lower()], new)
            edits.append(Edit(begin, end, new))
            k = last + 1
        return edits


def _gender(unit: Unit) -> str:
    return next((t for t in unit.tags if t in ("m", "f", "mf")), "")


def _number(unit: Unit) -> str:
    return next((t for t in unit.tags if t in ("sg", "pl", "sp")), "")


def _said(units: Sequence[Unit], k: int) -> int:
    """The noun behind a copula: *es un buen médico*; -1 if there is none."""
    for i in range(k + 1, len(units)):
        if units[i].tags[:1] == ("n",):
            return i
        if units[i].tags[:1] not in (("det",), ("adj",), ("adv",), ("preadv",), ("num",)):
            break
    return -1


@cache
def _people(language: str) -> frozenset[str]:
    return frozenset(term.text for term in load("gender", language).terms)


def _subject(units: Sequence[Unit], k: int) -> int:
    """The noun or pronoun before a verb that is in no prepositional phrase; -1 if there is none."""
    for i in range(k - 1, -1, -1):
        tags = units[i].tags
        if tags[:1] == ("sent",):
            return -1
        if tags[:2] == ("prn", "tn"):
            return i
        if tags[:1] == ("n",):
            j = i
            while j and units[j - 1].tags[:1] in (("det",), ("adj",), ("num",)):
                j -= 1
            if units[j].before or (j and units[j - 1].tags[:1] == ("pr",)):
                continue
            return i
    return -1


@cache
def pairs(language: str) -> tuple[dict[str, str], dict[str, str]]:
    """Male to female and female to male nouns that are different words."""
    male: dict[str, str] = {}
    female: dict[str, str] = {}
    path = Path(__file__).with_name("data") / f"pairs.{language}.tsv"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            a, b = line.split("\t")
            male.setdefault(a, b)
            female.setdefault(b, a)
    return male, female
