"""Two documents in, aligned beads of sentences out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuneutils.shared.artifact import Input, check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, require
from tuneutils.shared.files import atomic_file
from tuneutils.shared.records import open_writer
from tuneutils.shared.streams import require_readable
from tuneutils.tools.xl_parallel import glossary, lengths
from tuneutils.tools.xl_parallel.band import band
from tuneutils.tools.xl_parallel.beads import Bead, best_path, whole
from tuneutils.tools.xl_parallel.params import AlignParams
from tuneutils.tools.xl_parallel.sides import read_lines
from tuneutils.tools.xl_parallel.similarity import BlockCosts, Vectors, View, kinds_up_to, sums
from tuneutils.tools.xl_parallel.vectors import encoder_input, open_encoder

Floats = NDArray[np.float64]

#: Weights of the views in a similarity: what is spelt alike, glosses by a dictionary, an encoder's vectors.
#: Chosen, as similarity.py's constants, on the development part of Bleualign's German-French articles.
SPELLING, GLOSS, ENCODER = 0.14, 0.4, 0.2

#: Cells of a table that Gale-Church, which has no band, may fill.
_WHOLE = 50_000_000


@dataclass(frozen=True)
class Aligned:
    """A bead and how alike its sides are, 0 to 1; None by length alone or where a side is empty."""

    bead: Bead
    score: float | None


def align(run: Run[AlignParams]) -> dict[str, Any]:
    """Run ``xl-parallel align``; returns the summary."""
    params = run.params
    require("scipy", "parallel")
    if len(run.inputs) != 2:
        raise ToolError(f"takes a source and a target document, got {len(run.inputs)}", code=ExitCode.USAGE)
    for path in run.inputs:
        require_readable(path)
    inputs = [describe_input("document", path) for path in run.inputs]
    inputs += [describe_input("dictionary", params.dictionary)] if params.dictionary else []
    inputs += [encoder_input(params.encoder)] if params.encoder else []
    check_stream(run, inputs)
    sides = [_numbered(path) for path in run.inputs]
    src, tgt = ([text for _, text in side] for side in sides)
    if len({*src} & {*tgt}) > 0.5 * min(len(src), len(tgt)):
        run.log.warning("most sentences of %s are also in %s: the same language twice?", *run.inputs)
    beads = align_texts(src, tgt, params)
    counts: Counter[str] = Counter()
    with open_writer(str(run.output)) as writer:
        for bead, score in ((a.bead, a.score) for a in beads):
            a, b = bead.src_end - bead.src_start, bead.tgt_end - bead.tgt_start
            if not a or not b:
                counts["left out"] += 1
            elif score is not None and params.min_score is not None and score < params.min_score:
                counts["below --min-score"] += 1
            else:
                counts[f"{a}-{b}"] += 1
                writer.write(_record(bead, score, sides, params))
    if params.ladder:
        _write_ladder(Path(params.ladder), [a.bead for a in beads], sides)
    return _finish(run, inputs, counts, len(src), len(tgt))


def align_texts(src: Sequence[str], tgt: Sequence[str], params: AlignParams) -> list[Aligned]:
    """The beads that cover both documents in order."""
    method = _method(params)
    sizes = [np.array([len(t) for t in side], np.float64) for side in (src, tgt)]
    if method == "gale-church":
        if len(src) * len(tgt) > _WHOLE:
            raise ToolError(
                f"{len(src)} by {len(tgt)} sentences are too many for lengths alone, which fills the whole "
                "table; try --method dictionary, or align chapters",
                code=ExitCode.USAGE,
            )
        return [Aligned(b, None) for b in _by_length(sizes[0], sizes[1])]
    views = _views(src, tgt, params, method)
    kinds = kinds_up_to(params.max_size)

    def blocks(block: int, left: NDArray[np.int64], width: int) -> tuple[BlockCosts, list[Bead]]:
        summed = [View(_summed(v.src, block), _summed(v.tgt, block), v.weight) for v in views]
        widths = [_summed(side, block) for side in sizes]
        costs = BlockCosts(summed, widths[0], widths[1], kinds, left, width)
        n, m = len(widths[0]), len(widths[1])
        return costs, best_path(n, m, kinds, costs, costs.insertion, left, width)

    left, width = band(len(src), len(tgt), lambda *at: blocks(*at)[1])
    costs, beads = blocks(1, left, width)
    return [Aligned(bead, score) for bead, score in zip(beads, costs.scores(beads))]


def _method(params: AlignParams) -> str:
    """The method asked for, or the most that the options given allow.

    Raises:
        ToolError: it needs an option that is not given, or has no use for one that is (2).
    """
    if params.method == "auto":
        return "embedding" if params.encoder else "dictionary"
    if params.method == "embedding" and not params.encoder:
        raise ToolError("--method embedding needs --encoder", code=ExitCode.USAGE)
    unused = {"gale-church": ("dictionary", "encoder", "min_score"), "dictionary": ("encoder",)}
    for name in unused.get(params.method, ()):
        if getattr(params, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ToolError(f"--method {params.method} has no use for {option}", code=ExitCode.USAGE)
    return params.method


def _by_length(src: Floats, tgt: Floats) -> list[Bead]:
    kinds, costs, insertion = lengths.gale_church(src, tgt)
    return best_path(len(src), len(tgt), kinds, costs, insertion, *whole(len(src), len(tgt)))


def _views(src: Sequence[str], tgt: Sequence[str], params: AlignParams, method: str) -> list[View]:
    views = [View(*glossary.spelling(src, tgt), SPELLING)]
    if params.dictionary:
        dictionary = glossary.load(params.dictionary)
        glosses = [glossary.gloss(text, dictionary) for text in src]
        views.append(View(*glossary.spelling(glosses, tgt), GLOSS))
    if method == "embedding":
        assert params.encoder is not None
        encoder = open_encoder(params.encoder)
        views.append(View(encoder.sums(src, params.src_lang), encoder.sums(tgt, params.tgt_lang), ENCODER))
    return views


def _summed(rows: Vectors, block: int) -> Vectors:
    if block == 1:
        return rows
    ends = np.minimum(np.arange(block, rows.shape[0] + block, block), rows.shape[0])
    return sums(rows, np.diff(ends, prepend=0), ends)


def _numbered(path: str) -> list[tuple[int, str]]:
    """Line numbers from 0 and sentences, blank lines left out.

    Raises:
        ToolError: no sentence at all (65).
    """
    found = [(i, " ".join(line.split())) for i, line in enumerate(read_lines(path)) if line.strip()]
    if not found:
        raise ToolError(f"{path}: no sentences")
    return found


def _record(
    bead: Bead, score: float | None, sides: list[list[tuple[int, str]]], params: AlignParams
) -> dict[str, Any]:
    left, right = sides[0][bead.src_start : bead.src_end], sides[1][bead.tgt_start : bead.tgt_end]
    record: dict[str, Any] = {
        "src": " ".join(t for _, t in left), "tgt": " ".join(t for _, t in right),
        "src_lang": params.src_lang, "tgt_lang": params.tgt_lang,
    }  # fmt: skip
    if score is not None:
        record["score"] = round(score, 4)
    return {**record, "src_lines": [i + 1 for i, _ in left], "tgt_lines": [j + 1 for j, _ in right]}


def _write_ladder(path: Path, beads: Sequence[Bead], sides: list[list[tuple[int, str]]]) -> None:
    """Lines such as ``[0]:[0, 1]``, counted from 0, as Bleualign's gold and Vecalign's output have them."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as sink:
        for bead in beads:
            left = [i for i, _ in sides[0][bead.src_start : bead.src_end]]
            sink.write(f"{left}:{[j for j, _ in sides[1][bead.tgt_start : bead.tgt_end]]}\n")


def _finish(
    run: Run[AlignParams], inputs: list[Input], counts: Counter[str], n: int, m: int
) -> dict[str, Any]:
    aligned = counts.total() - counts["left out"] - counts["below --min-score"]
    metrics = {"sentences": {"src": n, "tgt": m}, "beads": dict(sorted(counts.items())), "aligned": aligned}
    licences = sorted({i.licence for i in inputs[:2] if i.licence})
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=" AND ".join(licences) or None)
    shown = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
    run.log.info("%d and %d sentences, %d pairs (%s)", n, m, aligned, shown)
    if counts["left out"] > 0.5 * (n + m):
        run.log.warning("more than half of the sentences have no counterpart: are these translations?")
    return {"output": run.output, "metrics": metrics}
