"""Questions about a domain from its held-out documents: which word belongs here?

An item hides one word of a held-out sentence. The word and a neighbour of it stand together in the train
documents, so the domain can teach it; no ``LEAK`` words in a row of the sentence do, so that it cannot have
been learnt by heart. The other choices are words of the same case and ending, about as frequent, that stand
after the same words of grammar.
"""

from __future__ import annotations

import bisect
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuneutils.shared.streams import Record
from tuneutils.tools.corpus_build.sentences import WORD, paragraphs, sentences
from tuneutils.tools.corpus_build.tokens import tokenize, windows
from tuneutils.tools.corpus_build.vocabulary import FUNCTION_WORDS, Vocabulary, kind, likest

LEAK = 8
CHOICES = 4
CONTEXT_WORDS = 60
LEAST_CONTEXT_WORDS = 12
REST_WORDS = 12
LEAST_DOCUMENTS = 3


@dataclass(frozen=True)
class Item:
    """A sentence with a word taken out.

    Attributes:
        context: what stands before the word, up to a few sentences.
        rest: what follows it in the sentence.
        choices: the word and three others, in random order; ``answer`` is the word's index.
        source: of the held-out document: id, path, offset, licence.
    """

    context: str
    word: str
    rest: str
    choices: tuple[str, ...]
    answer: int
    source: dict[str, Any]
    sentence: str

    def as_record(self) -> Record:
        rest = " ".join(self.rest.split()[:REST_WORDS])
        joint = "" if not rest or rest[0] in ".,;:!?)" else " "
        return {
            "context": self.context,
            "word": self.word,
            "endings": [f"{choice}{joint}{rest}" for choice in self.choices],
            "choices": list(self.choices),
            "answer": self.answer,
            "sentence": self.sentence,
            **self.source,
        }


class Maker:
    """Makes items from held-out records.

    Args:
        vocabulary: of the train documents.
        own: the domain's own words, lower-cased; None takes any content word.
    """

    def __init__(self, vocabulary: Vocabulary, own: set[str] | None, seed: int) -> None:
        self.vocabulary, self.own, self.seed = vocabulary, own, seed
        by_kind: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
        for word, count in vocabulary.count.items():
            if self._content(word) and vocabulary.documents[word] >= LEAST_DOCUMENTS:
                by_kind[kind(word)].append((count, word))
        self._by_kind = {k: sorted(words) for k, words in by_kind.items()}

    def _content(self, word: str) -> bool:
        return len(word) >= 4 and word.lower() not in FUNCTION_WORDS

    def candidates(self, record: Record) -> Iterator[Item]:
        """Items of one document, at most one a sentence."""
        rng = random.Random(f"{self.seed}:{record['id']}")
        source = {k: record[k] for k in ("id", "path", "offset", "licence") if k in record}
        for paragraph in paragraphs(record["text"]):
            before = ""
            for sentence in sentences(paragraph):
                found = list(WORD.finditer(sentence))
                if 8 <= len(found) <= 60 and sentence.endswith((".", "!", "?")):
                    item = self._item(sentence, found, before, source, rng)
                    if item is not None:
                        yield item
                before = f"{before} {sentence}".strip()

    def _item(
        self,
        sentence: str,
        found: Sequence[re.Match[str]],
        before: str,
        source: dict[str, Any],
        rng: random.Random,
    ) -> Item | None:
        places = [
            i for i in range(max(3, len(found) // 3), len(found)) if self._may_be_hidden(found, i, before)
        ]
        rng.shuffle(places)
        for place in places:
            match = found[place]
            context = " ".join(f"{before} {sentence[: match.start()]}".split()[-CONTEXT_WORDS:])
            if len(context.split()) < LEAST_CONTEXT_WORDS:
                continue
            others = self._others(match.group(), f"{before} {sentence}")
            if len(others) < CHOICES - 1:
                continue
            choices = [match.group(), *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            return Item(
                context, match.group(), sentence[match.end() :].strip(), tuple(choices),
                choices.index(match.group()), source, sentence,
            )  # fmt: skip
        return None

    def _may_be_hidden(self, found: Sequence[re.Match[str]], place: int, before: str) -> bool:
        word = found[place].group()
        low = word.lower()
        if not self._content(word) or self.vocabulary.documents[word] < LEAST_DOCUMENTS:
            return False
        if self.own is not None and low not in self.own:
            return False
        told = {m.group().lower() for m in found[:place]} | {w.lower() for w in WORD.findall(before)}
        previous = found[place - 1].group().lower()
        following = found[place + 1].group().lower() if place + 1 < len(found) else ""
        pairs = self.vocabulary.pairs
        return low not in told and max(pairs[previous, low], pairs[low, following]) >= 2

    def _others(self, word: str, text: str) -> list[str]:
        """Words of its kind, half to twice as frequent, that stand where it does and not in the text."""
        count = self.vocabulary.count[word]
        ranked = self._by_kind.get(kind(word), [])
        low = bisect.bisect_left(ranked, ((count + 1) // 2, ""))
        high = bisect.bisect_right(ranked, (2 * count, "\U0010ffff"))
        used = {w.lower() for w in WORD.findall(text)}
        stem = word.lower()[:5]
        pool = [w for _, w in ranked[low:high] if w.lower() not in used and w.lower()[:5] != stem]
        pool = [w for w in pool if self.vocabulary.likeness(word, w) >= 0.5]
        return likest(self.vocabulary, word, pool, 3 * (CHOICES - 1))


def without_leaks(items: Sequence[Item], train: Iterable[str]) -> tuple[list[Item], int]:
    """The items of whose sentence no ``LEAK`` words in a row stand in a train text, and how many others."""
    words = tokenize([item.sentence for item in items]).words()
    grams, first = windows(words, LEAK)
    order = np.argsort(grams, kind="stable")
    known = grams[order]
    leaked = np.zeros(len(grams), bool)
    for batch in _batches(train):
        found = np.unique(windows(tokenize(batch).words(), LEAK)[0])
        start, end = np.searchsorted(known, found), np.searchsorted(known, found, side="right")
        for a, b in zip(start[end > start], end[end > start], strict=True):
            leaked[order[a:b]] = True
    owner = np.searchsorted(words.bounds, first, side="right") - 1
    bad = set(owner[leaked].tolist())
    return [item for i, item in enumerate(items) if i not in bad], len(bad)


def _batches(texts: Iterable[str], characters: int = 1 << 20) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def spread(items: Sequence[Item], count: int, per_document: int, seed: int) -> list[Item]:
    """At most ``count`` items, at most ``per_document`` of one document, and no word more than thrice."""
    rng = random.Random(seed)
    shuffled = list(items)
    rng.shuffle(shuffled)
    of_document: Counter[str] = Counter()
    of_word: Counter[str] = Counter()
    chosen = []
    for item in shuffled:
        document, word = str(item.source.get("id")), item.word.lower()
        if of_document[document] < per_document and of_word[word] < 3 and len(chosen) < count:
            of_document[document] += 1
            of_word[word] += 1
            chosen.append(item)
    return chosen
