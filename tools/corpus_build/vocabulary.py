"""The words of a corpus: how often, in how many documents, beside which words; which are the domain's own."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from tuneutils.tools.corpus_build.sentences import WORD

#: Words of grammar and of the calendar, no answers to anything; the first also tell kinds of words apart.
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about above after again against all also although am among an and another any are as
        at be became because been before being below between both but by can could did do does
        doing down during each either else ever every few for from further had has have having
        he her here hers herself him himself his how however i if in into is it its itself just
        less like made make many may me might more most much must my neither no nor not now of
        off often on once one only or other our ours out over own per quite rather said same she
        should since so some still such than that the their theirs them themselves then there
        these they this those though three through thus to too two under until up upon us use
        used using very was we well were what when where whether which while who whom whose why
        will with within without would yet you your yours january february march april may june
        july august september october november december monday tuesday wednesday thursday friday
        saturday sunday
        """,
    )
)
_SUFFIXES = (
    "ing", "tion", "sion", "ness", "ment", "ity", "able", "ible", "ally",
    "ly", "ed", "es", "s", "er", "al", "ive",
)  # fmt: skip


@dataclass
class Vocabulary:
    """Words as they are written.

    Attributes:
        count, documents: occurrences, and documents that have the word.
        before: of each word, the words of grammar that stand right before it, counted.
        pairs: neighbouring words, lower-cased, counted.
    """

    count: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    before: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        made = cls()
        for text in texts:
            words = WORD.findall(text)
            low = [w.lower() for w in words]
            made.count.update(words)
            made.documents.update(set(words))
            made.pairs.update(pairwise(low))
            for previous, word in zip(low, words[1:], strict=False):
                if previous in FUNCTION_WORDS:
                    made.before[word][previous] += 1
        return made

    def likeness(self, a: str, b: str) -> float:
        """Cosine of the words of grammar before each: near 1 for words of one kind, noun or verb."""
        first, second = self.before.get(a), self.before.get(b)
        if not first or not second:
            return 0.0
        dot = sum(n * second[w] for w, n in first.items())
        norms = math.hypot(*first.values()) * math.hypot(*second.values())
        return dot / norms


def kind(word: str) -> tuple[str, str]:
    """Its case and its ending: words of another kind would give an answer away."""
    case = "upper" if word.isupper() and len(word) > 1 else "title" if word[:1].isupper() else "lower"
    low = word.lower()
    return case, next((s for s in _SUFFIXES if low.endswith(s) and len(low) > len(s) + 2), "")


def log_odds(
    domain: Mapping[str, int], general: Mapping[str, int], prior: float = 0.01
) -> list[tuple[str, float]]:
    """Words by how much more they are the domain's: z-scores of log-odds ratios, the highest first.

    Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 and 22, with the informative Dirichlet
    prior ``alpha_w`` = ``prior`` times the count in both.
    """
    both = Counter(domain) + Counter(general)
    n_domain, n_general = sum(domain.values()), sum(general.values())
    total = prior * (n_domain + n_general)
    scores = []
    for word, count in both.items():
        alpha = prior * count
        a, b = domain.get(word, 0) + alpha, general.get(word, 0) + alpha
        delta = math.log(a / (n_domain + total - a)) - math.log(b / (n_general + total - b))
        scores.append((word, delta / math.sqrt(1 / a + 1 / b)))
    return sorted(scores, key=lambda pair: (-pair[1], pair[0]))


def lower_counts(texts: Iterable[str]) -> Counter[str]:
    """Lower-cased words of letters, counted."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text.lower()))
    return counts


def likest(vocabulary: Vocabulary, word: str, pool: Sequence[str], count: int) -> list[str]:
    """The ``count`` words of the pool that stand where ``word`` does, the likest first."""
    ranked = sorted(pool, key=lambda other: (-vocabulary.likeness(word, other), other))
    return ranked[:count]
