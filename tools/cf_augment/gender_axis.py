"""The gender axis over all texts of a record: everybody at once, or each person alone."""

from __future__ import annotations

from collections.abc import Sequence

from tuneutils.tools.cf_augment.agreement import agreeing
from tuneutils.tools.cf_augment.edits import Edit, Text
from tuneutils.tools.cf_augment.gender import Gender, GenderOptions
from tuneutils.tools.cf_augment.outcome import Undecided
from tuneutils.tools.cf_augment.persons import Cast
from tuneutils.tools.cf_augment.scan import Hit, outside, protected
from tuneutils.tools.cf_augment.twins import Version

_NOT_SWAPPED = frozenset(("sexed", "deity"))


class GenderAxis:
    """Pronouns, nouns, titles and names of the persons of a record."""

    name = "gender"

    def __init__(self, options: GenderOptions) -> None:
        self.options = options
        self.rules = Gender(options)

    def versions(self, found: Sequence[Text], _key: bytes, /) -> list[Version | Undecided]:
        """No version for texts without a term; otherwise versions, or reasons why not."""
        hits = [self.hits(text) for text in found]
        kinds = {hit[2][0].kind for those in hits for hit in those}
        if kinds <= _NOT_SWAPPED:
            return []
        if "pronoun" in kinds:
            for text in found:
                if "deity" in kinds or "God" in text.source or "Lord" in text.source:
                    return [Undecided("deity", "a pronoun may be a deity's")]
        if self.options.persons == "each":
            return self._each(found, hits)
        made = self._version("", found, hits, hits)
        return [made] if made else []

    def hits(self, text: Text) -> list[Hit]:
        """The terms of a text that stand outside code and addresses."""
        hits = self.rules.table.hits(text.words, text.seps)
        if hits and (spans := protected(text.source)):
            return outside(hits, text.words, text.seps, spans)
        return hits

    def _version(
        self, name: str, found: Sequence[Text], hits: Sequence[Sequence[Hit]], every: Sequence[Sequence[Hit]]
    ) -> Version | Undecided | None:
        """``hits`` rewritten, of ``every`` hit in the texts."""
        everybody = self.options.to == "swap" and hits is every
        names = {"": "" if everybody else self._staying(hits, every)}
        try:
            edits = [self._edits(text, those, names) for text, those in zip(found, hits)]
        except Undecided as why:
            return why
        return Version(name, edits) if any(edits) else None

    def _staying(self, hits: Sequence[Sequence[Hit]], every: Sequence[Sequence[Hit]]) -> str:
        """First names that keep their bearers, which no other person may get."""
        goes = {h.entry.text for those in hits for h in those if self.rules.goes(h.entry)}
        names = {h.entry.text for those in every for h in those if h.entry.kind == "name"}
        return " ".join(sorted(names - goes))

    def _edits(self, text: Text, hits: Sequence[Hit], names: dict[str, str]) -> list[Edit]:
        made = []
        words, seps, plain = text.words, text.seps, self.rules.plain
        for hit in hits:
            new = plain.get(words[hit.start]) if seps[hit.start] == " " else None
            if new is None:
                new = self.rules.rewrite(hit, words, seps, names)
            if new is None:
                continue
            made.append(Edit(hit.start, hit.end, new))
            if self.options.to == "neutral" and hit.entries[0].slot == "subject":
                made += agreeing(hit.start, words, seps)
        return text.with_articles(made) if made else made

    def _each(self, found: Sequence[Text], hits: Sequence[Sequence[Hit]]) -> list[Version | Undecided]:
        """A version for each person whose mentions the text decides."""
        cast = Cast(self.rules.table)
        try:
            cast.read(found, hits)
        except Undecided as why:
            return [why]
        made: list[Version | Undecided] = []
        labels: dict[str, int] = {}
        for person in cast.persons:
            if self.rules.target(person.gender) is None:
                continue
            if person.doubt is not None:
                made.append(person.doubt)
                continue
            mine = [[h for at, h in person.mentions if at == t] for t in range(len(found))]
            sexed = [[h for h in those if h.entries[0].kind == "sexed"] for those in hits]
            those = [sorted([*a, *b]) for a, b in zip(mine, sexed)]
            labels[person.label] = labels.get(person.label, 0) + 1
            label = person.label if labels[person.label] == 1 else f"{person.label}-{labels[person.label]}"
            version = self._version(label.replace(" ", "-"), found, those, hits)
            if version is not None:
                made.append(version)
        return made
