"""Mining of held-out gettext pairs by the BUCC protocol; the encoder is learnt from other messages.

    python benchmarks/xl_mine.py --work /tmp/xl-mine [--src en --tgt es] [--encoder FOLDER_OR_ID]

Fetches the catalogues of --package (Debian) by xl-parallel extract, takes messages of four words or more,
divides them by xl-parallel split (no sentence, nor a near-copy, in two parts) and learns an encoder of the
first part. Each of the other two parts makes piles of --size source and twice as many target sentences, of
which half as many as --size are known pairs and the rest has no counterpart. The threshold is tuned on one
part's piles; F1 is that of the other's, with a bootstrap interval over its source sentences.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

PACKAGES = (
    "git", "gimp-data", "inkscape", "evolution-common", "gnucash-common", "binutils-common", "gnupg-l10n",
    "util-linux-locales", "vlc-l10n", "aptitude-common", "pidgin-data", "claws-mail-i18n", "libglib2.0-data",
    "e2fsprogs-l10n", "subversion", "nautilus-data", "coreutils", "bash", "gettext", "dpkg",
)  # fmt: skip
RESAMPLES = 1000


def xl(*args: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "tuneutils.tools.xl_parallel.cli", *map(str, args)], check=True)


def fetch(args: argparse.Namespace, work: Path) -> Path:
    """All pairs of all packages in one stream; a package that cannot be had is named and left out."""
    joined = work / "pairs.jsonl"
    if joined.exists():
        return joined
    lines: list[str] = []
    for name in args.package or PACKAGES:
        source = f"deb:{name}!/usr/share/locale/{args.tgt}/LC_MESSAGES/*.mo"
        out = work / f"{name}.jsonl"
        try:
            xl("extract", source, "-q", "--src-lang", args.src, "--tgt-lang", args.tgt, "--min-words", "4",
               "-o", out)  # fmt: skip
        except subprocess.CalledProcessError:
            continue
        lines += out.read_text(encoding="utf-8").splitlines(keepends=True)
    if not lines:
        raise SystemExit("no package could be had")
    joined.write_text("".join(lines), encoding="utf-8")
    return joined


def piles(part: Path, size: int, seed: str) -> tuple[Path, Path, Path]:
    """Two piles and their known pairs, made of a part's pairs; every sentence once."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    rng.shuffle(rows)
    seen: set[str] = set()
    distinct = []
    for row in rows:
        if row["src"] not in seen and row["tgt"] not in seen:
            seen |= {row["src"], row["tgt"]}
            distinct.append(row)
    half, needed = size // 2, size // 2 + size // 2 + 3 * (size // 2)
    if len(distinct) < needed:
        raise SystemExit(f"{part}: {len(distinct)} distinct pairs, --size {size} needs {needed}")
    gold = distinct[:half]
    sides = {
        "src": [r["src"] for r in distinct[: 2 * half]],
        "tgt": [r["tgt"] for r in gold + distinct[2 * half : needed]],
    }
    made = []
    for side, texts in sides.items():
        rng.shuffle(texts)
        made.append(part.with_suffix(f".{side}"))
        made[-1].write_text("".join(f"{t}\n" for t in texts), encoding="utf-8")
    known = part.with_suffix(".gold.jsonl")
    known.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in gold), encoding="utf-8")
    return made[0], made[1], known


def interval(mined: Path, known: Path, sources: Path) -> tuple[float, float]:
    """95 % of F1 over bootstrap resamples of the source sentences."""
    gold = {(r["src"], r["tgt"]) for r in map(json.loads, known.read_text(encoding="utf-8").splitlines())}
    found = {r["src"]: r["tgt"] for r in map(json.loads, mined.read_text(encoding="utf-8").splitlines())}
    of_gold = dict(gold)
    texts = sources.read_text(encoding="utf-8").splitlines()
    rows = np.array([[(t, found.get(t)) in gold, t in found, t in of_gold] for t in texts], float)
    rng = np.random.default_rng(0)
    sums = np.array([rows[rng.integers(0, len(rows), len(rows))].sum(0) for _ in range(RESAMPLES)])
    low, high = np.percentile(2 * sums[:, 0] / (sums[:, 1] + sums[:, 2]), (2.5, 97.5))
    return float(low), float(high)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--src", default="en")
    parser.add_argument("--tgt", default="es")
    parser.add_argument("--package", action="append", help="Debian package; default 20 of them")
    parser.add_argument("--encoder", help="another encoder than the one learnt here")
    parser.add_argument("--size", type=int, default=3000)
    parser.add_argument("--margin", default="distance")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pairs = fetch(args, args.work)
    parts = args.work / "parts"
    xl("split", pairs, "--split", "train=0.6,tune=0.2,test=0.2", "-o", parts, "--force")
    encoder = args.encoder or args.work / "encoder"
    if not args.encoder:
        xl("encoder", parts / "train.jsonl", "-o", encoder, "--force")
    common = ("--src-lang", args.src, "--tgt-lang", args.tgt, "--encoder", encoder, "--margin", args.margin)
    out = {name: args.work / f"{name}.mined.jsonl" for name in ("tune", "test")}
    src, tgt, gold = piles(parts / "tune.jsonl", args.size, "tune")
    xl("mine", src, tgt, *common, "--tune", gold, "-o", out["tune"], "--force")
    src, tgt, gold = piles(parts / "test.jsonl", args.size, "test")
    xl("mine", src, tgt, *common, "--threshold", out["tune"], "--gold", gold, "-o", out["test"], "--force")
    metrics = json.loads(Path(f"{out['test']}.artifact.json").read_text())["metrics"]
    low, high = interval(out["test"], gold, src)
    print(
        f"{args.src}-{args.tgt}: test F1 {metrics['gold']['f1']:.4f} [{low:.4f}, {high:.4f}], "
        f"{metrics['gold']['gold']} known pairs, threshold tuned on other piles"
    )


if __name__ == "__main__":
    main()
