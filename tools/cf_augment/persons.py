"""Who is who: the mentions of a record, put together into persons, as far as the text decides.

No parser: names link by themselves and by their surname, nouns by their determiner, pronouns to the only
person they can mean. Where there are two, the persons concerned are marked: no twin is written for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tuneutils.tools.cf_augment.edits import Text
from tuneutils.tools.cf_augment.names import is_name
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.scan import Hit, Table
from tuneutils.tools.cf_augment.words import word_set

_PEOPLE = word_set("people")
_OWNERS = frozenset(["my", "your", "his", "her", "our", "their", "whose", "s"])
_NEW = frozenset(("a", "an", "another", "one", "some", "two"))
_PLURAL_NOUNS = ("men", "women", "ladies", "gentlemen", "people")


@dataclass
class Person:
    """One person, or a group that a plural names.

    Attributes:
        label: the name or noun by which the person came in.
        gender: ``female`` or ``male``.
        mentions: (index of the text, hit).
        doubt: why a mention may be this person's or another's.
    """

    label: str
    gender: str
    mentions: list[tuple[int, Hit]] = field(default_factory=list)
    doubt: Undecided | None = None


class Cast:
    """The persons of a record, filled from the first mention to the last."""

    def __init__(self, table: Table) -> None:
        self.persons: list[Person] = []
        self._table = table
        self._by_key: dict[tuple[str, ...], Person] = {}
        self._open: set[str] = set()  # persons whose gender no word shows
        self._next_name: Person | None = None

    def read(self, found: Sequence[Text], hits: Sequence[Sequence[Hit]]) -> None:
        for t, (text, those) in enumerate(zip(found, hits)):
            at = {hit.start: hit for hit in those}
            for i, word in enumerate(text.words):
                if (hit := at.get(i)) is not None:
                    self._mention(t, text, hit, at)
                elif word.lower() in _PEOPLE and not _predicate(text.words, i):
                    self._open.add(word.lower())

    def _mention(self, t: int, text: Text, hit: Hit, at: dict[int, Hit]) -> None:
        kind = hit.entry.kind
        if kind == "pronoun":
            self._pronoun(t, text, hit)
        elif kind == "name":
            self._name(t, text, hit)
        elif kind in ("noun", "title") and hit.entry.text != "god":
            self._noun(t, text, hit, at)

    def _person(self, key: tuple[str, ...], label: str, gender: str) -> Person:
        if key not in self._by_key:
            self._by_key[key] = Person(label, gender)
            self.persons.append(self._by_key[key])
        return self._by_key[key]

    def _name(self, t: int, text: Text, hit: Hit) -> None:
        if not is_name(hit, text.words, text.seps, self._table):
            return
        if hit.entry.group == "either":
            self._open.add(hit.entry.text)
            return
        key = ("name", hit.entry.text)
        if self._next_name is not None and self._next_name.gender == hit.entry.group:
            self._by_key.setdefault(key, self._next_name)
        self._next_name = None
        surname = _capital(text, hit.end)
        if key not in self._by_key and surname and ("surname", surname, hit.entry.group) in self._by_key:
            self._by_key[key] = self._by_key["surname", surname, hit.entry.group]
        person = self._person(key, hit.entry.text, hit.entry.group)
        if surname:
            self._by_key.setdefault(("surname", surname, hit.entry.group), person)
        person.mentions.append((t, hit))

    def _noun(self, t: int, text: Text, hit: Hit, at: dict[int, Hit]) -> None:
        entry, words = hit.entry, text.words
        before = words[hit.start - 1].lower() if hit.start else ""
        follows = at.get(hit.end)
        named = (
            follows is not None and follows.entry.kind == "name" and text.seps[hit.end] in (" ", ". ", ", ")
        )
        if named and follows is not None and before not in _OWNERS and before not in _NEW:
            key: tuple[str, ...] = ("name", follows.entry.text)
        elif entry.kind == "title":
            surname = _capital(text, hit.end) or _capital(text, hit.end + 1)
            key = ("surname", surname or entry.text, entry.group)
        elif entry.text.endswith("s") or entry.text.endswith(_PLURAL_NOUNS):
            key = ("plural", entry.text)
        elif before in _NEW:
            key = ("noun", entry.text, entry.group)
            if key in self._by_key:
                self._doubt([self._by_key[key]], f"{before} {words[hit.start]}", text, hit)
        elif before in _OWNERS:
            key = ("noun", entry.text, entry.group, before)
        else:
            key = ("noun", entry.text, entry.group)
            if key not in self._by_key and (others := self._of(entry.group)):
                self._doubt(others, f"{before} {words[hit.start]}", text, hit)
        named = (
            follows is not None and follows.entry.kind == "name" and text.seps[hit.end] in (" ", ". ", ", ")
        )
        if named and follows is not None and ("name", follows.entry.text) in self._by_key:
            self._by_key.setdefault(key, self._by_key["name", follows.entry.text])
        person = self._person(key, entry.text, entry.group)
        person.mentions.append((t, hit))
        self._next_name = person if named else None

    def _pronoun(self, t: int, text: Text, hit: Hit) -> None:
        gender = hit.entry.group
        known = self._of(gender)
        if len(known) == 1 and not self._open:
            known[0].mentions.append((t, hit))
            return
        unnamed = self._person(("pronoun", gender), hit.entry.text, gender) if not known else None
        if unnamed is not None:
            unnamed.mentions.append((t, hit))
            return
        if len(known) == 1 and known[0].label in ("he", "she", "him", "her", "his", "hers"):
            known[0].mentions.append((t, hit))
            if len(self._open) > 1:
                self._doubt(known, text.words[hit.start], text, hit)
            return
        self._doubt(known, text.words[hit.start], text, hit)

    def _of(self, gender: str) -> list[Person]:
        return [p for p in self.persons if p.gender == gender]

    def _doubt(self, persons: Sequence[Person], word: str, text: Text, hit: Hit) -> None:
        others = [p.label for p in persons] + sorted(self._open)
        after = " ".join(text.words[hit.start : hit.start + 3])
        for person in persons:
            person.doubt = person.doubt or Undecided(
                "which person", f"{word!r} in {after!r} may be one of: {', '.join(others[:4])}"
            )


def _predicate(words: Sequence[str], i: int) -> bool:
    """*is a nurse* and *as a nurse* say something of a person who is already there."""
    return i > 1 and words[i - 1].lower() in ("a", "an", "the") and words[i - 2].lower() in _SAID_OF


_SAID_OF = frozenset(
    ("is", "was", "are", "were", "be", "been", "being", "as", "became", "become", "s", "m", "re")
)


def _capital(text: Text, i: int) -> str:
    """Word ``i`` in lower case if it is a capitalised word that follows directly."""
    if i < len(text.words) and text.words[i][0].isupper() and text.seps[i] in (" ", ". "):
        return text.words[i].lower()
    return ""
