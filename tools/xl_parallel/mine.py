"""Two piles of sentences in, pairs of translations out."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.artifact import Input, check_stream, describe_input, load_manifest, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, GateFailed, ToolError
from tuneutils.shared.records import Reader, open_writer
from tuneutils.tools.xl_parallel.encoder import Encoder, normalised
from tuneutils.tools.xl_parallel.glossary import sketched_spelling
from tuneutils.tools.xl_parallel.margins import Agreement, Pairs, measure, nearest, retrieve, tune
from tuneutils.tools.xl_parallel.params_pairs import MineParams
from tuneutils.tools.xl_parallel.sides import read_lines
from tuneutils.tools.xl_parallel.vectors import encoder_input, open_encoder, seems_swapped

#: Texts encoded at once.
BATCH = 1 << 14
#: Weight of shared spelling beside an encoder of our own.
SPELLING = 0.5


@dataclass(frozen=True)
class Pile:
    """The distinct sentences of a file.

    Attributes:
        lines: the first line of each, from 1.
        repeated: lines left out as equal to an earlier one.
    """

    texts: list[str]
    lines: list[int]
    repeated: int

    def number(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}


def mine(run: Run[MineParams]) -> dict[str, Any]:
    """Run ``xl-parallel mine``; returns the summary.

    Raises:
        GateFailed: F1 is below ``--min-f1``; the pairs are written all the same.
    """
    params = run.params
    if len(run.inputs) != 2:
        raise ToolError(f"takes two piles, source and target; got {len(run.inputs)}", code=ExitCode.USAGE)
    if params.tune and params.threshold:
        raise ToolError("--tune finds the threshold that --threshold gives; use one", code=ExitCode.USAGE)
    if params.min_f1 is not None and not params.gold:
        raise ToolError("--min-f1 needs --gold", code=ExitCode.USAGE)
    inputs = _inputs(run)
    threshold = _threshold(params.threshold)
    check_stream(run, inputs)
    src, tgt = (read_pile(path) for path in run.inputs)
    pairs = found(run, src, tgt)
    results: dict[str, Agreement] = {}
    if params.tune:
        correct, gold = _correct(pairs, src, tgt, params.tune)
        results["tuned"] = tune(pairs.scores, correct, gold)
        if not results["tuned"].correct:
            raise ToolError(f"--tune {params.tune}: none of its {gold} pairs was found; nothing to tune by")
        threshold = results["tuned"].threshold
    if params.gold:
        correct, gold = _correct(pairs, src, tgt, params.gold)
        results["gold"] = measure(pairs.scores, correct, gold, -np.inf if threshold is None else threshold)
    written = _write(run, pairs, src, tgt, threshold)
    metrics = _metrics(run, src, tgt, written, threshold, results)
    licences = sorted({i.licence for i in inputs[:2] if i.licence})
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=" AND ".join(licences) or None)
    if params.min_f1 is not None and results["gold"].f1 < params.min_f1:
        raise GateFailed(f"F1 {results['gold'].f1:.3f} is below --min-f1 {params.min_f1:g}")
    return {"output": run.output, "metrics": metrics}


def read_pile(path: str) -> Pile:
    """The distinct lines of a text, or texts of a record stream; blank ones are no sentences.

    Raises:
        ToolError: there are none (65).
    """
    if ".jsonl" in path or path.endswith(".parquet"):
        lines = [r["text"] for r in Reader([path], formats=("text",))]
    else:
        lines = read_lines(path)
    as_written = dict(zip(reversed(lines), range(len(lines), 0, -1)))  # each distinct line, where it is first
    first: dict[str, int] = {}
    for line, number in sorted(as_written.items(), key=lambda item: item[1]):
        if text := " ".join(line.split()):
            first.setdefault(text, number)
    full = sum(not line.isspace() for line in lines if line)
    if not first:
        raise ToolError(f"{path}: no sentences")
    return Pile(list(first), list(first.values()), full - len(first))


def found(run: Run[MineParams], src: Pile, tgt: Pile) -> Pairs:
    """The pairs that are retrieved, whatever their score."""
    from tuneutils.shared import device  # noqa: F401 - the thread policy, before faiss

    params = run.params
    encoder = open_encoder(params.encoder)
    x, y = (
        np.concatenate(
            [encoder.encode(pile.texts[i : i + BATCH], lang) for i in range(0, len(pile.texts), BATCH)]
        )
        for pile, lang in ((src, params.src_lang), (tgt, params.tgt_lang))
    )
    weight = params.spelling
    if weight is None:
        weight = SPELLING if isinstance(encoder, Encoder) else 0.0
    for pile, rows, name in ((src, x, run.inputs[0]), (tgt, y, run.inputs[1])):
        if blank := int((~rows.any(1)).sum()):
            run.log.warning("%s: nothing is known of %d of %d sentences", name, blank, len(pile.texts))
    if seems_swapped(encoder, src.texts, tgt.texts, params.src_lang, params.tgt_lang):
        run.log.warning("the encoder knows more of %s as %s: swapped piles?", run.inputs[0], params.tgt_lang)
    if weight:
        shared = sketched_spelling(*([without_accents(t) for t in pile.texts] for pile in (src, tgt)))
        x, y = (normalised(np.hstack([a, weight * normalised(b)])) for a, b in zip((x, y), shared))
    forward = nearest(x, y, params.k, params.search, run.seed)
    backward = nearest(y, x, params.k, params.search, run.seed)
    return retrieve(forward, backward, params.margin, params.retrieval)


def without_accents(text: str) -> str:
    """Decomposed, combining marks left out: cognates of two languages are then spelt more alike."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def _correct(pairs: Pairs, src: Pile, tgt: Pile, gold: str) -> tuple[NDArray[np.bool_], int]:
    """Whether each pair is among the known ones, and how many of these are in the piles."""
    left, right = src.number(), tgt.number()
    known = {
        (left[a], right[b])
        for a, b in (
            (" ".join(r["src"].split()), " ".join(r["tgt"].split()))
            for r in Reader([gold], formats=("parallel",))
        )
        if a in left and b in right
    }
    if not known:
        raise ToolError(f"{gold}: none of its pairs has both sentences in the piles")
    both = zip(pairs.src.tolist(), pairs.tgt.tolist())
    return np.array([pair in known for pair in both], bool), len(known)


def _threshold(given: str | None) -> float | None:
    """A number, or that of a stream which ``mine --tune`` wrote."""
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        pass
    beside = Path(f"{given}.artifact.json")
    if not beside.is_file():
        raise ToolError(
            f"--threshold {given}: neither a number nor a stream with {beside.name} beside it",
            code=ExitCode.USAGE,
        )
    metrics = load_manifest(beside).get("metrics", {})
    if "tuned" not in metrics:
        raise ToolError(f"--threshold {given}: was not written with --tune", code=ExitCode.USAGE)
    return float(metrics["threshold"])


def _write(run: Run[MineParams], pairs: Pairs, src: Pile, tgt: Pile, threshold: float | None) -> int:
    written = 0
    with open_writer(str(run.output)) as writer:
        for i, j, score in zip(pairs.src.tolist(), pairs.tgt.tolist(), pairs.scores.tolist()):
            if threshold is not None and score < threshold:
                continue
            written += 1
            writer.write(
                {
                    "src": src.texts[i], "tgt": tgt.texts[j],
                    "src_lang": run.params.src_lang, "tgt_lang": run.params.tgt_lang,
                    "score": round(score, 6), "src_line": src.lines[i], "tgt_line": tgt.lines[j],
                }
            )  # fmt: skip
    return written


def _metrics(
    run: Run[MineParams], src: Pile, tgt: Pile, written: int, threshold: float | None, results: dict[str, Any]
) -> dict[str, Any]:
    run.log.info(
        "%d pairs of %d and %d sentences (%d and %d repeated), threshold %s", written, len(src.texts),
        len(tgt.texts), src.repeated, tgt.repeated, "none" if threshold is None else f"{threshold:.4f}",
    )  # fmt: skip
    for name, r in results.items():
        run.log.info(
            "%s: F1 %.4f, precision %.4f, recall %.4f (%d correct of %d; %d known)", name, r.f1, r.precision,
            r.recall, r.correct, r.extracted, r.gold,
        )  # fmt: skip
    counts = {"src": len(src.texts), "tgt": len(tgt.texts), "repeated": [src.repeated, tgt.repeated]}
    shown = {
        name: {k: round(v, 6) if isinstance(v, float) else v for k, v in vars(r).items() if k != "threshold"}
        for name, r in results.items()
    }
    return {"pairs": written, "sentences": counts, "threshold": threshold, **shown}


def _inputs(run: Run[MineParams]) -> list[Input]:
    """The piles, and what else decides."""
    params = run.params
    made = [*(describe_input("pile", path) for path in run.inputs), encoder_input(params.encoder)]
    known = (("tune", params.tune), ("gold", params.gold))
    return made + [describe_input(role, path) for role, path in known if path]
