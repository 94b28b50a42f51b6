"""The gender axis: pronouns, nouns, titles and first names of one text, each to its counterpart.

Names are paired one to one by frequency and gender-specificity (Maudslay et al. 2019, "It's All in the Name",
section 3.2), so that swapping twice gives the original.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tuneutils.shared.lexicons import NO_GROUP, load, load_names
from tuneutils.tools.cf_augment.names import is_name
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.pronouns import Tagger, models
from tuneutils.tools.cf_augment.scan import Entry, Hit, Table
from tuneutils.tools.cf_augment.words import cased_like, word_set

DATA = Path(__file__).with_name("data")
OTHER = {"female": "male", "male": "female"}
#: Before a name *Sir* is no *Madam*.
_KNIGHTED = {"sir": "dame", "dame": "sir"}
_CROWNED = frozenset(("king", "queen", "prince", "princess", "emperor", "empress", "tsar", "tsarina", "czar"))
_REGNAL = re.compile(r"[IVX]+")
_DIVINE = ("god", "lord", "father")

#: Pronoun → (gender, form); ``her`` and ``his`` have two forms, which the tagger tells apart.
PRONOUNS = {
    "he": ("male", "subject"), "she": ("female", "subject"),
    "him": ("male", "object"), "her": ("female", ""),
    "his": ("male", ""), "hers": ("female", "alone"),
    "himself": ("male", "reflexive"), "herself": ("female", "reflexive"),
}  # fmt: skip
FORMS = {
    "male": {"subject": "he", "object": "him", "determiner": "his", "alone": "his", "reflexive": "himself"},
    "female": {
        "subject": "she", "object": "her", "determiner": "her", "alone": "hers", "reflexive": "herself",
    },
    "neutral": {
        "subject": "they", "object": "them", "determiner": "their", "alone": "theirs",
        "reflexive": "themself",
    },
}  # fmt: skip

#: Words that bind a person to one sex: the counterpart would say what cannot be.
SEXED = word_set("sexed")
#: Male forms that serve for everybody: they stay, while their female counterparts become them.
GENERIC = word_set("generic")
#: Capitalised words behind which a capitalised noun is still a noun.
_FUNCTION = word_set("function")


@dataclass(frozen=True)
class GenderOptions:
    """Which way, and what.

    Attributes:
        to: ``swap`` for both ways, or the one gender that all become; ``neutral`` is singular they.
        names: change first names as well.
        persons: ``all`` at once, or a version for ``each``.
        tagger: ``own`` or ``spacy``.
        min_log_odds: below this the tagger's answer counts as undecided.
    """

    to: str = "swap"
    names: bool = True
    min_log_odds: float = 0.4
    persons: str = "all"
    tagger: str = "own"


@cache
def table(names: bool) -> Table:
    """All terms of the axis."""
    found = Table()
    for word, (gender, form) in PRONOUNS.items():
        found.add(Entry("pronoun", word, gender, form))
    for term in load("gender").terms:
        if term.text in PRONOUNS or ("'" in term.text and term.group != NO_GROUP):
            continue
        if term.group == NO_GROUP:
            found.add(Entry("none", term.text))
        elif term.group in OTHER and term.slot:
            kind = "title" if term.slot.startswith("title") else "noun"
            found.add(
                Entry(kind, term.text, term.group, term.slot, "word" in term.flags),
                capital="capital" in term.flags or kind == "title",
            )
    for word in SEXED:
        found.add(Entry("sexed", word))
    for word in word_set("deities"):
        found.add(Entry("deity", word), capital=True)
    if names:
        for name in load_names():
            common = bool(name.flags) or name.text in word_set("words-too")
            entry = Entry("name", name.text, name.group, name.ethnicity, common)
            found.add(entry, capital=True)
    return found


@cache
def name_pairs() -> dict[str, str]:
    """First names in lower case to those of the other gender, both ways."""
    pairs: dict[str, str] = {}
    for line in (DATA / "names.tsv").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            female, male, ways = line.split("\t")
            if ways in ("both", "female"):
                pairs[female] = male
            if ways in ("both", "male"):
                pairs[male] = female
    return pairs


@cache
def nouns() -> dict[tuple[str, str], str]:
    """(noun, group of the counterpart) → counterpart."""
    found: dict[tuple[str, str], str] = {}
    lexicon = load("gender")
    for term in lexicon.terms:
        for group, other in lexicon.counterparts(term).items():
            found.setdefault((term.text, group), other.text)
    for line in (DATA / "neutral.tsv").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            female, male, neutral = line.split("\t")
            found[female, "neutral"] = found[male, "neutral"] = neutral
    return found


def _taggers(name: str) -> dict[str, Tagger]:
    if name == "own":
        return dict(models())
    from tuneutils.tools.cf_augment.spacy_tagger import SpacyTagger

    tagger = SpacyTagger()
    return {"her": tagger, "his": tagger}


class Gender:
    """Rewrites one text at a time; holds what the texts of a record share."""

    def __init__(self, options: GenderOptions) -> None:
        self.options = options
        self.table = table(options.names)
        self._taggers = _taggers(options.tagger)
        self._targets = {group: self.target(group) for group in OTHER}
        #: Pronouns in lower case inside a sentence whose counterpart needs no more looking.
        self.plain = {
            word: FORMS[target][form]
            for word, (group, form) in PRONOUNS.items()
            if form and (target := self._targets[group]) is not None
        }

    def target(self, group: str) -> str | None:
        """What a mention of ``group`` becomes; None if it stays."""
        to = self.options.to
        if to == "swap":
            return OTHER[group]
        return to if group != to else None

    def goes(self, entry: Entry) -> bool:
        """Whether a name is one that changes."""
        return entry.kind == "name" and entry.group in OTHER and self.target(entry.group) in OTHER

    def rewrite(
        self, hit: Hit, words: Sequence[str], seps: Sequence[str], names: dict[str, str]
    ) -> str | None:
        """The words that a hit becomes; None where it stays.

        Raises:
            Undecided: the text does not say.
        """
        entry = hit.entries[0]
        if entry.kind == "pronoun":
            return self._pronoun(hit, words, seps)
        if entry.kind == "name":
            return self._name(hit, words, seps, names)
        if entry.kind == "deity":
            return None
        if entry.kind == "sexed":
            raise Undecided("sexed", f"{words[hit.start]!r} goes with one sex")
        return self._noun(hit, words, seps)

    def _pronoun(self, hit: Hit, words: Sequence[str], seps: Sequence[str]) -> str | None:
        i = hit.start
        word, entry = words[i], hit.entries[0]
        target = self._targets[entry.group]
        if target is None:
            return None
        if seps[i] != " ":
            if i and seps[i].strip() in ("/", ")", "/)") and words[i - 1].lower() == "s":
                return None
        elif i and word.istitle() and not _heading(words, i):
            raise Undecided("deity", f"{word!r} with a capital inside a sentence")
        new = FORMS[target][entry.slot or self._form(i, words, seps)]
        return new if word.islower() else cased_like(new, word)

    def _form(self, i: int, words: Sequence[str], seps: Sequence[str]) -> str:
        word = words[i].lower()
        odds = self._taggers[word](words, seps, i)
        if abs(odds) < self.options.min_log_odds:
            raise Undecided("pronoun", f"{word!r} before {' '.join(words[i + 1 : i + 3])!r}: which use")
        return "determiner" if odds > 0 else "object" if word == "her" else "alone"

    def _noun(self, hit: Hit, words: Sequence[str], seps: Sequence[str]) -> str | None:
        i, entry = hit.start, hit.entry
        target = self.target(entry.group)
        if target is None or entry.text in GENERIC or part_of_name(hit, words, seps):
            return None
        written = words[i]
        if entry.text in _DIVINE and _divine(i, words, seps):
            return None
        if entry.text in _CROWNED and _regnal(hit.end, words, seps):
            raise Undecided("known person", f"{' '.join(words[i : i + 3])!r} is one person of history")
        other = nouns().get((entry.text, target))
        if (
            entry.text in _KNIGHTED
            and target == OTHER[entry.group]
            and _capital_follows(hit.end, words, seps)
        ):
            other = _KNIGHTED[entry.text]
        if other is None:
            raise Undecided("no counterpart", f"{entry.text!r} has no {target} counterpart")
        if entry.kind == "title" and seps[hit.end].startswith("."):
            other = other.rstrip(".")
        if entry.kind == "title":
            other = other[:1].upper() + other[1:]
        return cased_like(other, written)

    def _name(self, hit: Hit, words: Sequence[str], seps: Sequence[str], names: dict[str, str]) -> str | None:
        entry = hit.entry
        target = None if entry.group == "either" else self.target(entry.group)
        if target in (None, "neutral") or not is_name(hit, words, seps, self.table):
            return None
        if entry.text not in names:
            other = name_pairs().get(entry.text)
            if other is None:
                raise Undecided("no counterpart", f"the name {words[hit.start]!r} has no counterpart")
            names[entry.text] = _free(other, set(names.values()) | set(names.get("", "").split()))
        other = names[entry.text]
        return cased_like(other[:1].upper() + other[1:], words[hit.start])


@cache
def _ranked() -> dict[str, list[str]]:
    """The paired names of each gender, the most frequent first."""
    found: dict[str, list[str]] = {"female": [], "male": []}
    for name in load_names():
        if name.text in name_pairs() and not name.flags:
            found[name.group].append(name.text)
    return found


def _free(name: str, taken: set[str]) -> str:
    """``name``, or the next name of its gender that nobody in the record has."""
    if name not in taken:
        return name
    ranked = next((r for r in _ranked().values() if name in r), [])
    start = ranked.index(name) if ranked else 0
    return next((n for n in ranked[start:] + ranked[:start] if n not in taken), name)


def part_of_name(hit: Hit, words: Sequence[str], seps: Sequence[str]) -> bool:
    """*Burger King*, *Stephen King*: a capitalised noun behind a capitalised word of content."""
    i = hit.start
    if (
        hit.entry.kind == "title"
        or not words[i][0].isupper()
        or words[i].isupper()
        or not i
        or seps[i] != " "
    ):
        return False
    before = words[i - 1]
    return before[0].isupper() and before.lower() not in _FUNCTION


def _capital_follows(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    return i < len(words) and seps[i] == " " and words[i].istitle()


def _regnal(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    """A name and a Roman number: *King Charles I*."""
    number = words[i + 1] if i + 1 < len(words) and seps[i + 1] == " " else ""
    return _capital_follows(i, words, seps) and _REGNAL.fullmatch(number) is not None


def _divine(i: int, words: Sequence[str], seps: Sequence[str]) -> bool:
    """God, Lord and Father with a capital that no sentence start explains."""
    if not words[i][0].isupper() or words[i].isupper():
        return False
    return words[i] == "God" or bool(i and not seps[i].strip())


def _heading(words: Sequence[str], i: int) -> bool:
    """Most words around are capitalised: a title, in which capitals say nothing."""
    around = [w for w in words[max(0, i - 4) : i + 5] if len(w) > 3 or w is words[i]]
    return len(around) > 2 and sum(w[0].isupper() for w in around) >= 0.75 * len(around)
