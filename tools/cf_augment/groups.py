"""The axes other than gender: every mention of one group becomes the same meaning for another group.

Which group a group becomes is drawn once for a record, and always as an exchange: where Christians become
Muslims, Muslims become Christians, so that swapping twice gives the original.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.lexicons import NO_GROUP, Lexicon, load, load_names
from tuneutils.tools.cf_augment import gender
from tuneutils.tools.cf_augment.edits import Edit, Text
from tuneutils.tools.cf_augment.names import is_name
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.scan import Entry, Hit, Table, outside, protected
from tuneutils.tools.cf_augment.twins import Version
from tuneutils.tools.cf_augment.words import cased_like, word_set

_AGES = re.compile(r"\b\d{1,3}[- ]years?[- ]old|\baged? (?:of )?\d", re.IGNORECASE)
#: Slots whose terms are no proper nouns, in the axes whose groups have proper names.
_COMMON = frozenset(("place", "places", "clergy", "house", "scripture", "singular-man"))
_WITH_THE = frozenset(
    (
        "united states", "usa", "us", "u.s.", "u.s", "uk", "u.k.", "united kingdom", "netherlands",
        "philippines",
        "dominican republic", "czech republic", "united arab emirates", "maldives", "bahamas", "gambia",
    )
)  # fmt: skip
_PROPER_AXES = ("religion", "nationality")
_BE = frozenset(("is", "are", "was", "were", "be", "been", "am", "being", "became", "become", "becomes"))
_SAYS = word_set("says")
_OBJECTS = frozenset(
    ["the", "a", "an", "his", "her", "their", "my", "your", "this", "that", "it", "him", "them", "into"]
)
_AFTER_NOUN = word_set("closed") | frozenset(("who", "that", "there"))


@dataclass(frozen=True)
class Names:
    """First names by (ethnicity, gender), the most frequent first, and the place of each in its list."""

    lists: Mapping[tuple[str, str], tuple[str, ...]]
    places: Mapping[str, tuple[str, str, int]]

    def counterpart(self, name: str, group: str) -> str | None:
        """The name of the same gender and rank in another group; ranks beyond its list begin anew."""
        _, sex, rank = self.places[name]
        others = self.lists.get((group, sex), ())
        return others[rank % len(others)] if others else None


@cache
def names() -> Names:
    """The names that are listed under one ethnicity."""
    lists: dict[tuple[str, str], list[str]] = {}
    places = {}
    for name in load_names():
        if name.ethnicity:
            found = lists.setdefault((name.ethnicity, name.group), [])
            places[name.text] = (name.ethnicity, name.group, len(found))
            found.append(name.text)
    return Names({k: tuple(v) for k, v in lists.items()}, places)


def table(lexicon: Lexicon) -> Table:
    """All terms of an axis, and for ethnicity the names."""
    found = Table()
    for term in lexicon.terms:
        kind = "none" if term.group == NO_GROUP else "term"
        found.add(Entry(kind, term.text, term.group, term.slot), capital="capital" in term.flags)
    if lexicon.name == "ethnicity":
        for name in load_names():
            if name.ethnicity and name.text not in word_set("deities"):
                entry = Entry("name", name.text, name.ethnicity, "", bool(name.flags))
                found.add(entry, capital=True)
    return found


def counterparts(lexicon: Lexicon) -> dict[tuple[str, str, str], dict[str, str]]:
    """(text, group, slot) → counterparts by group; of adjectives, one that names people too comes first."""
    first: dict[tuple[str, str], str] = {}
    for term in lexicon.terms:
        first.setdefault((term.slot, term.group), term.text)
    people = {(t.text, t.group) for t in lexicon.terms if t.slot == "adherent"}
    for term in reversed(lexicon.terms):
        if term.slot == "adjective" and (term.text, term.group) in people:
            first["adjective", term.group] = term.text
    return {
        (t.text, t.group, t.slot): {
            group: first[t.slot, group]
            for group in lexicon.groups
            if t.slot and group != t.group and (t.slot, group) in first
        }
        for t in lexicon.terms
    }


class GroupAxis:
    """An axis of any number of groups.

    Args:
        lexicon: the axis by name, or a lexicon of one's own.
        pairs: the only exchanges to make; without any, each record draws its own.
    """

    def __init__(self, lexicon: str | Lexicon, pairs: Sequence[tuple[str, str]] = ()) -> None:
        lexicon = load(lexicon) if isinstance(lexicon, str) else lexicon
        self.name, self.groups = lexicon.name, lexicon.groups
        self._table, self._counterparts = table(lexicon), counterparts(lexicon)
        self.fixed = {a: b for pair in pairs for a, b in (pair, pair[::-1])}
        self._first_names = gender.table(True) if self.name == "ethnicity" else None

    def versions(self, found: Sequence[Text], key: bytes, /) -> list[Version | Undecided]:
        """One version, or the reason why not, for texts with a term; none for others."""
        try:
            hits = [self._hits(text) for text in found]
            if not any(hits):
                return []
            if self.name == "age" and any(_AGES.search(text.source) for text in found):
                raise Undecided("age in numbers", "an age in numbers goes with the term")
            exchange = self._exchange(hits, key)
            edits = [self._edits(text, those, exchange) for text, those in zip(found, hits)]
        except Undecided as why:
            return [why]
        return [Version("", edits)] if any(edits) else []

    def _hits(self, text: Text) -> list[Hit]:
        words, seps = text.words, text.seps
        hits = self._table.hits(words, seps)
        if hits and (spans := protected(text.source)):
            hits = outside(hits, words, seps, spans)
        kept = []
        for hit in hits:
            if hit.entry.kind == "name":
                assert self._first_names is not None
                if not is_name(hit, words, seps, self._first_names):
                    continue
            elif self.name == "nationality" and _language(hit, words):
                continue
            kept.append(hit._replace(entries=(_use(hit, words, seps),)))
        return kept

    def _exchange(self, hits: Sequence[Sequence[Hit]], key: bytes) -> dict[str, str]:
        """Group → the group that it becomes, for the groups that the record mentions."""
        present: dict[str, list[Entry]] = {}
        for those in hits:
            for hit in those:
                present.setdefault(hit.entry.group, []).append(hit.entry)
        if self.fixed:
            return {g: self.fixed[g] for g in present if g in self.fixed}
        made: dict[str, str] = {}
        for group, entries in present.items():
            if group in made:
                continue
            open_to = [
                other
                for other in self.groups
                if other != group
                and other not in made
                and self._all_go(entries, other)
                and self._all_go(present.get(other, []), group)
            ]
            if not open_to:
                worst = next((e for e in entries if not self._goes_anywhere(e)), entries[0])
                raise Undecided("no counterpart", f"{worst.text!r} has no counterpart in another group")
            draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") + self.groups.index(group)
            other = open_to[draw % len(open_to)]
            made[group] = other
            if other in present:
                made[other] = group
        return made

    def _all_go(self, entries: Sequence[Entry], group: str) -> bool:
        return all(self._counterpart(entry, group) is not None for entry in entries)

    def _goes_anywhere(self, entry: Entry) -> bool:
        return any(self._counterpart(entry, g) is not None for g in self.groups if g != entry.group)

    def _counterpart(self, entry: Entry, group: str) -> str | None:
        if entry.kind == "name":
            return names().counterpart(entry.text, group)
        return self._counterparts[entry.text, entry.group, entry.slot].get(group)

    def _edits(self, text: Text, hits: Sequence[Hit], exchange: Mapping[str, str]) -> list[Edit]:
        made = []
        for hit in hits:
            group = exchange.get(hit.entry.group)
            if group is None:
                continue
            new = self._counterpart(hit.entry, group)
            if new is None:
                raise Undecided("no counterpart", f"{hit.entry.text!r} has none in the group {group!r}")
            edit = Edit(hit.start, hit.end, self._cased(new, hit, group, text))
            made.append(_with_the(edit, hit, new, text) if hit.entry.slot == "country" else edit)
        return text.with_articles(made) if made else made

    def _cased(self, new: str, hit: Hit, group: str, text: Text) -> str:
        old = text.words[hit.start]
        if hit.entry.kind == "name":
            return cased_like(_capitals(new), old)
        if self.name not in _PROPER_AXES or (old.isupper() and len(old) > 1):
            return cased_like(new, old)
        common = hit.entry.slot in _COMMON
        if not common and group != "atheist":
            return _capitals(new)
        return cased_like(new, old) if common or _opens(hit, text) else new


def _with_the(edit: Edit, hit: Hit, new: str, text: Text) -> Edit:
    """*in the United States* and *in Japan*: the article comes and goes with the country."""
    k = hit.start - 1
    before = text.words[k] if k >= 0 and text.seps[hit.start] == " " else ""
    if hit.entry.text in _WITH_THE and new not in _WITH_THE and before.lower() == "the":
        return Edit(k, hit.end, edit.new)
    if new in _WITH_THE and hit.entry.text not in _WITH_THE and before.lower() not in ("the", "a", "an"):
        return Edit(edit.start, edit.end, f"{'The' if _opens(hit, text) else 'the'} {edit.new}")
    return edit


def _opens(hit: Hit, text: Text) -> bool:
    """A sentence begins here."""
    return not hit.start or any(c in text.seps[hit.start] for c in '.!?:\n"“')


def _use(hit: Hit, words: Sequence[str], seps: Sequence[str]) -> Entry:
    """Of a term that is an adjective and a noun, the one it is here: *a Christian*, *a Christian family*."""
    by_slot = {e.slot: e for e in hit.entries}
    noun, adjective = by_slot.get("adherent"), by_slot.get("adjective")
    if noun is None or adjective is None:
        return hit.entry
    after, beyond = (words[k].lower() if k < len(words) else "" for k in (hit.end, hit.end + 1))
    follows = after and seps[hit.end] == " " and after not in _AFTER_NOUN
    if follows and (after in _SAYS or (beyond in _OBJECTS and seps[hit.end + 1] == " ")):
        return noun
    predicate = hit.start and words[hit.start - 1].lower() in _BE
    return adjective if follows or predicate else noun


def _language(hit: Hit, words: Sequence[str]) -> bool:
    """*speaks French*, *in German*, *the French language*."""
    if hit.entry.slot != "adjective":
        return False
    before = words[hit.start - 1].lower() if hit.start else ""
    after = words[hit.end].lower() if hit.end < len(words) else ""
    return after in word_set("language-after") or (
        before in word_set("language-before") and not (after.isalpha() and after not in word_set("closed"))
    )


def _capitals(text: str) -> str:
    return re.sub(r"(?<![\w'])(?!of\b|the\b|and\b)\w", lambda m: m[0].upper(), text)


def parse_pairs(lexicon: Lexicon, given: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of ``--pair`` whose groups are this axis's.

    Raises:
        ToolError: (2) one that is no pair, or names one group of the axis and one that is not.
    """
    groups = lexicon.groups
    found = []
    for text in given:
        a, mark, b = text.partition("=")
        if not mark or not a or not b or a == b:
            raise ToolError(f"--pair {text!r}: write GROUP=GROUP", code=ExitCode.USAGE)
        if (a in groups) != (b in groups):
            wrong = b if a in groups else a
            raise ToolError(
                f"--pair {text!r}: {lexicon.name} has no group {wrong!r}{nearest(wrong, groups)}; "
                f"it has {', '.join(groups)}",
                code=ExitCode.USAGE,
            )
        if a in groups:
            found.append((a, b))
    return found
