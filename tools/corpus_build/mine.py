"""Questions and summaries that a passage holds already, found by rules.

Reading-comprehension tasks mined from raw text, after Cheng et al. 2024 (arXiv 2309.09530): definitions,
causes, dates, conditions, sections, titles, continuations, extractive summaries. The answer is always the
passage's own words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tuneutils.tools.corpus_build.names import QUESTIONS
from tuneutils.tools.corpus_build.sentences import WORD, paragraphs, sentences
from tuneutils.tools.corpus_build.vocabulary import FUNCTION_WORDS

PASSAGE_WORDS = 160
ABOUT_PASSAGE = ("title", "summary", "continuation")  # no questions without the passage
SUMMARISE = "Summarise the following text."
CONTINUE = "How does this text go on?"

_TERM = r"(?P<term>(?:[Tt]he |[Aa]n? )?[A-Z`\w][\w'’/-]*(?: [\w'’/-]+){0,4}?)"
_DEFINITION = re.compile(rf"{_TERM} (?P<verb>is|are) (?P<rest>(?:an?|the|one of the|any) .{{15,240}})\.\Z")
_CAUSE = re.compile(r"(?P<what>[A-Z][^,;:]{20,160}?),? because (?P<why>[^;:]{12,200})\.\Z")
_DATE = re.compile(
    r"(?:On (?P<month>(?:Jan|Febr)uary|March|April|May|June|July|August|(?:Sept|Nov|Dec)ember|October) "
    r"(?P<day>\d{1,2}),? (?P<year>\d{4})|In (?P<only>\d{4})),? (?P<what>[a-z][^;:]{20,200})\.\Z"
)
_CONDITION = re.compile(r"If (?P<when>[^,;:]{10,120}), (?:then )?(?P<what>[a-z][^;:]{15,200})\.\Z")
_PRONOUN = re.compile(
    r"(?:It|This|That|These|Those|They|There|He|She|We|You|I|Here|What|Which|Such|Each|Both|One|Some|All|If|When|Who)\b"
)
_HEADING = re.compile(
    r"(?:^|\n)(?:#{1,4} (?P<md>[^\n#]{3,80})"
    r"|(?P<rst>[^\n.:*#=|~`-][^\n|]{2,79})\n(?P<line>[=~^\-*])(?P=line){2,})\n+"
)


@dataclass(frozen=True)
class Question:
    """A question about a passage with its answer."""

    kind: str
    question: str
    answer: str
    passage: str


def questions(text: str, kinds: Sequence[str] = QUESTIONS) -> Iterator[Question]:
    """All questions that the rules find in a document, in the order of its passages."""
    yield from (q for q in _sections(text) if q.kind in kinds)
    for passage in passages(text):
        found = sentences(passage)
        for sentence in found:
            for kind, rule in _RULES.items():
                made = rule(sentence) if kind in kinds else None
                if made is not None:
                    yield Question(kind, made[0], made[1], passage)
                    break
        if "summary" in kinds and len(found) >= 4:
            yield Question("summary", SUMMARISE, summary(found), passage)
        if "continuation" in kinds:
            yield from _continuation(found)


def _continuation(found: Sequence[str]) -> Iterator[Question]:
    """The first half of a passage, and the sentence after it; of one sentence, its second half."""
    half = len(found) // 2
    if half:
        yield Question("continuation", CONTINUE, found[half], " ".join(found[:half]))
        return
    words = found[0].split()
    if len(words) >= 8:
        middle = len(words) // 2
        yield Question("continuation", CONTINUE, " ".join(words[middle:]), " ".join(words[:middle]))


def passages(text: str) -> Iterator[str]:
    """Neighbouring paragraphs of prose, joined up to ``PASSAGE_WORDS`` words."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs(text):
        words = len(paragraph.split())
        if held and size + words > PASSAGE_WORDS:
            yield " ".join(held)
            held, size = [], 0
        if words <= 2 * PASSAGE_WORDS:
            held.append(paragraph)
            size += words
    if held:
        yield " ".join(held)


def _definition(sentence: str) -> tuple[str, str] | None:
    match = _DEFINITION.match(sentence)
    if match is None or _PRONOUN.match(match["term"]) or len(match["term"]) < 3:
        return None
    term = match["term"]
    if term.split()[-1].lower() in FUNCTION_WORDS:
        return None
    term = term[0].lower() + term[1:] if re.match(r"(?:The|An?) ", term) else term
    return f"What {match['verb']} {term}?", f"{match['rest'][0].upper()}{match['rest'][1:]}."


def _cause(sentence: str) -> tuple[str, str] | None:
    match = _CAUSE.match(sentence)
    if match is None or _PRONOUN.match(match["what"]) or match["what"].split()[-1].lower() in FUNCTION_WORDS:
        return None
    return f"Why is it said that {_lowered(match['what'])}?", f"Because {match['why']}."


def _date(sentence: str) -> tuple[str, str] | None:
    match = _DATE.match(sentence)
    if match is None or _PRONOUN.match(match["what"].capitalize()):
        return None
    answer = match["only"] or f"{match['month']} {match['day']}, {match['year']}"
    return f"When did this happen: {match['what']}?", answer


def _condition(sentence: str) -> tuple[str, str] | None:
    match = _CONDITION.match(sentence)
    if match is None:
        return None
    return f"What holds if {match['when']}?", f"{match['what'][0].upper()}{match['what'][1:]}."


def _lowered(text: str) -> str:
    first = text.split()[0]
    return text[0].lower() + text[1:] if first.lower() in FUNCTION_WORDS else text


_RULES: dict[str, Callable[[str], tuple[str, str] | None]] = {
    "definition": _definition,
    "cause": _cause,
    "date": _date,
    "condition": _condition,
}


def _sections(text: str) -> Iterator[Question]:
    """A heading and the first paragraph of prose under it; the first heading of a document is its title."""
    found = list(_HEADING.finditer(text))
    for number, match in enumerate(found):
        title = re.sub(r"[`*_\\:]+", "", match["md"] or match["rst"]).strip()
        end = found[number + 1].start() if number + 1 < len(found) else len(text)
        below = next(paragraphs(text[match.end() : end]), "")
        if not 12 <= len(below.split()) <= PASSAGE_WORDS or len(WORD.findall(title)) < 1:
            continue
        if number == 0:
            yield Question("title", "What would be a good title for this text?", title, below)
        else:
            first = " ".join(sentences(below)[:2])
            yield Question("section", f"What is said about “{title}”?", first, below)


def summary(found: Sequence[str], share: float = 0.3) -> str:
    """The most central sentences, in order: those whose words are most like all the others'.

    Degree centrality of LexRank (Erkan and Radev 2004, section 3.1) over tf-idf cosines within the passage.
    """
    bags = [Counter(w.lower() for w in WORD.findall(s) if w.lower() not in FUNCTION_WORDS) for s in found]
    presence = Counter(w for bag in bags for w in bag)
    idf = {w: math.log(1 + len(found) / n) for w, n in presence.items()}
    vectors = [{w: n * idf[w] for w, n in bag.items()} for bag in bags]
    norms = [math.hypot(*v.values()) or 1.0 for v in vectors]
    scores = [
        sum(
            sum(x * other.get(w, 0.0) for w, x in mine.items()) / (norms[i] * norms[j])
            for j, other in enumerate(vectors)
            if j != i
        )
        for i, mine in enumerate(vectors)
    ]
    count = max(1, round(share * len(found)))
    best = sorted(sorted(range(len(found)), key=lambda i: (-scores[i], i))[:count])
    return " ".join(found[i] for i in best)
