"""Questions written by a model, and all questions filtered by asking it back.

Round-trip consistency (Alberti et al. 2019, arXiv 1906.05416): an answer is taken from the passage, the model
asks for it, and answers its own question from the passage; kept is what comes back.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from tuneutils.tools.corpus_build.mine import ABOUT_PASSAGE, Question
from tuneutils.tools.corpus_build.sentences import WORD, sentences
from tuneutils.tools.corpus_build.vocabulary import FUNCTION_WORDS

ASK = "Text: {passage}\n\nWrite one short question about this text whose answer is “{answer}”."
ANSWER = "Text: {passage}\n\nAnswer from the text, as briefly as you can.\nQuestion: {question}"

#: Prompts in, answers out.
Model = Callable[[Sequence[str]], list[str]]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD's scorer has them (Rajpurkar et al. 2016)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation and c not in "“”’‘")
    return _ARTICLES.sub(" ", plain).split()


def f1(a: str, b: str) -> float:
    """SQuAD's token F1."""
    first, second = normalised(a), normalised(b)
    common = sum((Counter(first) & Counter(second)).values())
    if not common:
        return float(first == second)
    precision, recall = common / len(second), common / len(first)
    return 2 * precision * recall / (precision + recall)


def agrees(answer: str, given: str, least: float) -> bool:
    """Whether an answer came back: F1 is enough, or all of it stands in what was given in one piece."""
    wanted, got = normalised(answer), normalised(given)
    inside = (
        any(got[i : i + len(wanted)] == wanted for i in range(len(got) - len(wanted) + 1))
        if wanted
        else False
    )
    return (inside and len(got) <= len(wanted) + 25) or f1(answer, given) >= least


def answer_spans(passage: str, rng: random.Random, count: int) -> list[str]:
    """Stretches of a passage that can be asked for: names of several words, numbers, and rare words."""
    found = re.findall(
        r"(?:[A-Z][\w-]+ ){1,3}[A-Z][\w-]+|\b\d[\d,.]*\d?(?: (?:percent|per cent|%|\w+))?", passage
    )
    words = [
        w
        for s in sentences(passage)
        for w in WORD.findall(s)
        if w.lower() not in FUNCTION_WORDS and len(w) > 6
    ]
    spans = list(dict.fromkeys(s.strip(" .,") for s in [*found, *words]))
    spans = [s for s in spans if s and s.split()[0].lower() not in FUNCTION_WORDS]
    return rng.sample(spans, min(count, len(spans)))


def written(passages: Sequence[str], model: Model, *, per_passage: int, seed: int) -> list[Question]:
    """One question for each answer drawn from each passage, as the model writes it."""
    rng = random.Random(seed)
    drawn = [(p, a) for p in passages for a in answer_spans(p, rng, per_passage)]
    replies = model([ASK.format(passage=p, answer=a) for p, a in drawn])
    made = []
    for (passage, answer), reply in zip(drawn, replies, strict=True):
        question = reply.strip().split("\n")[0].strip(' "“”')
        gives_away = " ".join(normalised(answer)) in " ".join(normalised(question))
        if question.endswith("?") and 3 <= len(question.split()) <= 40 and not gives_away:
            made.append(Question("model", question, answer, passage))
    return made


def returned(
    questions: Sequence[Question], model: Model, least: float
) -> tuple[list[Question], list[Question]]:
    """The questions whose answer the model gives back from the passage, and the others.

    Summaries, titles and continuations are no questions of fact: they are kept.
    """
    asked = [q for q in questions if q.kind not in ABOUT_PASSAGE]
    replies = model([ANSWER.format(passage=q.passage, question=q.question) for q in asked])
    right = {id(q) for q, reply in zip(asked, replies, strict=True) if agrees(q.answer, reply, least)}
    kept = [q for q in questions if id(q) in right or q.kind in ABOUT_PASSAGE]
    return kept, [q for q in asked if id(q) not in right]
