"""Sentence alignment against a human gold standard: strict and lax F1, sentences a second.

    python benchmarks/xl_align.py dev.de dev.fr dev.defr --src-lang de --tgt-lang fr --work /tmp/xl-align \
        [--catalogues FOLDER_OR_SOURCE]

SRC and TGT have a sentence a line; GOLD has beads such as ``[0]:[0, 1]``, as Bleualign's data do.
The dictionary is FreeDict's (fetched by xl-parallel extract from Debian); the encoder is learnt from the
catalogues of the programs installed here, or of --catalogues. Nothing of SRC, TGT or GOLD is learnt from, but
the four constants of similarity.py and the weights of align.py were chosen on Bleualign's development part:
there, read the numbers as fitted. Strict: the same bead; lax: a bead that shares a sentence on both sides;
insertions and deletions do not count (Thompson and Koehn 2019, section 5.1). Intervals: bootstrap over
stretches of ten source sentences, since an error brings another beside it. Times are CPU seconds on one
thread: from sentences in memory to beads, and with encoder and dictionary read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

Beads = list[tuple[tuple[int, ...], tuple[int, ...]]]
RESAMPLES, STRETCH = 1000, 10


def read_beads(path: Path) -> Beads:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            left, right = line.split(":")[:2]
            found.append((tuple(json.loads(left)), tuple(json.loads(right))))
    return found


def strict(some: Beads, others: Beads) -> list[bool]:
    """Whether each of some is one of the others."""
    there = set(others)
    return [bead in there for bead in some]


def lax(some: Beads, others: Beads) -> list[bool]:
    """Whether each of some shares a sentence of both sides with one of the others."""
    pairs = {(i, j) for a, b in others for i in a for j in b}
    return [any((i, j) in pairs for i in a for j in b) for a, b in some]


def measures(counts: np.ndarray) -> np.ndarray:
    """``(…, 3)`` precision, recall and F1 of ``(…, 4)``: right and all of the test, right and all of gold."""
    right, test, known, gold = np.moveaxis(counts.astype(float), -1, 0)
    precision, recall = right / np.maximum(test, 1), known / np.maximum(gold, 1)
    return np.stack([precision, recall, 2 * precision * recall / np.maximum(precision + recall, 1e-12)], -1)


def score(gold: Beads, test: Beads) -> dict[str, list[float]]:
    """Of both kinds precision, recall, F1, and the 95 % interval of F1."""
    gold, test = ([b for b in beads if all(b)] for beads in (gold, test))
    made = {}
    for name, agree in (("strict", strict), ("lax", lax)):
        counts = np.zeros((max(b[0][0] for b in gold + test) // STRETCH + 1, 4), int)
        for column, some, others in ((0, test, gold), (2, gold, test)):
            for bead, right in zip(some, agree(some, others)):
                counts[bead[0][0] // STRETCH, column : column + 2] += (right, 1)
        drawn = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
        interval = np.percentile(measures(counts[drawn].sum(1))[:, 2], (2.5, 97.5))
        made[name] = [*measures(counts.sum(0)).tolist(), *interval.tolist()]
    return made


def xl(*args: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "tuneutils.tools.xl_parallel.cli", *map(str, args)], check=True)


def made(work: Path, args: argparse.Namespace) -> tuple[str, str]:
    """Dictionary and encoder, made once by the commands that a user would run."""
    langs = ("--src-lang", args.src_lang, "--tgt-lang", args.tgt_lang)
    codes = {"de": "deu", "fr": "fra", "en": "eng", "es": "spa", "sw": "swh", "cy": "cym"}
    name = "-".join(codes.get(code, code) for code in (args.src_lang, args.tgt_lang))
    dictionary, pairs, encoder = work / "dictionary.jsonl", work / "pairs.jsonl", work / "encoder"
    source = f"deb:dict-freedict-{name}!/usr/share/dictd/freedict-{name}.*"
    xl("extract", "-q", source, *langs, "--format", "dictionary", "-o", dictionary)
    xl("extract", "-q", args.catalogues, *langs, "--min-words", "2", "-o", pairs)
    xl("encoder", "-q", pairs, "-o", encoder)
    return str(dictionary), str(encoder)


def ours(
    src: Sequence[str], tgt: Sequence[str], repeats: int, **options: str | None
) -> tuple[Beads, float, float]:
    from tuneutils.tools.xl_parallel import align, glossary
    from tuneutils.tools.xl_parallel.params import AlignParams

    params = AlignParams(src_lang=options.pop("src_lang"), tgt_lang=options.pop("tgt_lang"), **options)
    read = glossary.load, align.open_encoder
    glossary.load, align.open_encoder = (cache(one) for one in read)  # only the first time reads files
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        beads = align.align_texts(src, tgt, params)
        seconds.append(time.process_time() - start)
    glossary.load, align.open_encoder = read
    shown = [a.bead for a in beads]
    found = [(tuple(range(b.src_start, b.src_end)), tuple(range(b.tgt_start, b.tgt_end))) for b in shown]
    return found, min(seconds[1:]), seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("src", "tgt", "gold"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--src-lang", required=True)
    parser.add_argument("--tgt-lang", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--catalogues", default="/usr/share/locale")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    src, tgt = (
        [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (args.src, args.tgt)
    )
    if not all(src) or not all(tgt):
        sys.exit("a blank line: this script compares by line numbers")
    dictionary, encoder = made(args.work, args)
    gold = read_beads(args.gold)
    langs = {"src_lang": args.src_lang, "tgt_lang": args.tgt_lang}
    engines = {
        "Gale-Church": {"method": "gale-church"},
        "spelling alone": {},
        "with dictionary": {"dictionary": dictionary},
        "with encoder": {"encoder": encoder},
        "with both": {"dictionary": dictionary, "encoder": encoder},
    }
    size = min(len(src), len(tgt))
    rows = {"identity": {**score(gold, [((i,), (i,)) for i in range(size)])}}
    for name, options in engines.items():
        found, seconds, whole = ours(src, tgt, args.repeats, **langs, **options)
        rows[name] = {
            **score(gold, found),
            "sentences_per_s": len(src) / seconds, "with_loading": len(src) / whole,
        }  # fmt: skip
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def show(rows: dict[str, dict]) -> None:
    print("| engine | strict P | R | F1 | lax P | R | F1 | source sentences / CPU s | with loading |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        numbers = " | ".join(
            f"{p:.3f} | {r:.3f} | {f:.3f} [{low:.3f}, {high:.3f}]"
            for p, r, f, low, high in (row["strict"], row["lax"])
        )
        rates = " | ".join(f"{row[k]:,.0f}" if k in row else "" for k in ("sentences_per_s", "with_loading"))
        print(f"| {name} | {numbers} | {rates} |")


if __name__ == "__main__":
    main()
