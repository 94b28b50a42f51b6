"""Raw files to a corpus: each document by itself, then all together, then split, written and reported."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Artifact, Input, describe_input, log_event
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.device import usable_cpus
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Located, Reader
from tuneutils.shared.sources import Resolved
from tuneutils.tools.corpus_build import contamination, rules
from tuneutils.tools.corpus_build.find import Found, Item, bring, items, tasks
from tuneutils.tools.corpus_build.params import BuildParams
from tuneutils.tools.corpus_build.pool import Pool
from tuneutils.tools.corpus_build.prepare import Part, Settings
from tuneutils.tools.corpus_build.report import write_report
from tuneutils.tools.corpus_build.split import Split, split
from tuneutils.tools.corpus_build.workers import parts

ROLES = ("decontaminate", "target", "general")


def build(run: Run[BuildParams]) -> Summary:
    """Make the corpus.

    Raises:
        ToolError: nothing to read (66), or nothing left of it (65).
    """
    params = run.params
    _check(params)
    inputs, sources = _inputs(run)
    with run.artifact("corpus", inputs) as art:
        started = time.monotonic()
        spool = art.dir / "spool"
        spool.mkdir()
        found = Found()
        settings = _settings(params, spool)
        contamination.save(contamination.benchmark_grams(_records(params.decontaminate)), spool)
        work = tasks(_items(sources, found, run, spool))
        pool = Pool(spool, _judged(parts(work, settings, workers=params.workers or usable_cpus(),
                                         executor=params.executor), run, art))  # fmt: skip
        try:
            _require_some(run, pool, found)
            _together(run, pool)
            made = split(pool, params, run.seed)
            made.write(pool, art.dir)
            summary = write_report(run, art, pool, found, made)
        finally:
            pool.close()
        (spool / "all.dropped").replace(art.dir / "dropped.jsonl")
        shutil.rmtree(spool)
        log_event(run, event="done", seconds=time.monotonic() - started, bytes=found.bytes)
        _say(run, pool, found, made)
        return {"output": run.output, **summary}


def _check(params: BuildParams) -> None:
    if params.select is not None and not params.target:
        raise ToolError("--select needs --target: records that show the domain", code=ExitCode.USAGE)
    if params.target and params.select is None:
        raise ToolError("--target needs --select: the share of the documents to draw", code=ExitCode.USAGE)


def _inputs(run: Run[BuildParams]) -> tuple[list[Input], list[Resolved | None]]:
    brought = [bring(text) for text in run.inputs]
    inputs = [given for given, _ in brought]
    for role in ROLES:
        inputs += [describe_input(role, path) for path in getattr(run.params, role)]
    if run.params.perplexity_model:
        from tuneutils.shared.models import model_input

        inputs.append(model_input(run.params.perplexity_model, "perplexity-model"))
    return inputs, [resolved for _, resolved in brought]


def _settings(params: BuildParams, spool: Path) -> Settings:
    return Settings(
        spool=str(spool.absolute()),
        rules=rules.chosen(params.rule, params.no_rule),
        languages=params.language,
        language_score=params.language_score,
        identify=params.identify or bool(params.language),
        mask=() if "none" in params.mask else params.mask,
        text_field=params.text_field,
        min_characters=params.min_characters,
        max_file_bytes=params.max_file_bytes,
        cut_bytes=params.max_document_bytes,
        licence=params.licence,
        near=params.near > 0,
        features=params.dsir_hash if params.select is not None else None,
    )


def _records(paths: Sequence[str]) -> Iterator[Any]:
    for path in paths:
        yield from Reader([path])


def _items(
    sources: Sequence[Resolved | None], found: Found, run: Run[BuildParams], spool: Path
) -> Iterator[Item]:
    cut = run.params.max_document_bytes
    for source in sources:
        if source is not None:
            yield from items([source], found, cut_bytes=cut)
        else:
            path = spool / "stdin.jsonl"
            with open(path, "wb") as sink:
                shutil.copyfileobj(sys.stdin.buffer, sink, 1 << 20)
            stdin = Resolved("-", (path,), "", "unknown")
            for item in items([stdin], found, cut_bytes=cut):
                yield Item(**{**vars(item), "shown": "<stdin>"})


def _judged(made: Iterator[Part], run: Run[BuildParams], art: Artifact) -> Iterator[Part]:
    """Parts as they come, their bad lines treated as ``--on-error`` says."""
    reader = Reader(["-"], on_error=run.on_error, quarantine=art.work / "quarantine.jsonl")
    if run.on_error == "quarantine":
        (art.work / "quarantine.jsonl").unlink(missing_ok=True)
    with run.progress(None, "documents") as progress:
        for part in made:
            for bad in part.bad:
                reader.refuse(Located({}, bad.shown, bad.number), bad.reason, bad.raw)
                part.dropped["bad record"] += 1
                part.read += 1
            progress.update(part.read)
            yield part


def _require_some(run: Run[BuildParams], pool: Pool, found: Found) -> None:
    if len(pool.alive):
        return
    reasons = pool.dropped + found.left
    for entry in pool.unreadable:
        reasons[entry["reason"]] += 1
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(4))
    shown = ", ".join("<stdin>" if i == "-" else i for i in run.inputs)
    raise ToolError(f"{shown}: no document left ({why})" if why else f"{shown}: no records or texts")


def _together(run: Run[BuildParams], pool: Pool) -> None:
    """What needs all documents: duplicates, repeats, perplexity, selection."""
    params = run.params
    pool.drop_exact()
    if params.near > 0:
        pool.drop_near(params.near)
    if params.substring_words:
        pool.cut_repeats(params.substring_words, params.min_characters)
    if params.perplexity_model:
        from tuneutils.tools.corpus_build.perplexity import drop_buckets

        drop_buckets(run, pool)
    if params.select is not None:
        from tuneutils.tools.corpus_build.select import select

        select(pool, params, run.seed)


def _say(run: Run[BuildParams], pool: Pool, found: Found, made: Split) -> None:
    run.log.info(
        "%d files, %d documents: %d train, %d held out; %d dropped",
        found.files, pool.read, len(made.train), len(made.heldout), sum(pool.dropped.values()),
    )  # fmt: skip
    for reason, count in pool.dropped.most_common():
        run.log.info("%d dropped: %s", count, reason)
    left = found.left.copy()
    for entry in pool.unreadable:
        left[entry["reason"]] += 1
    for reason, count in left.most_common():
        run.log.info("%d files left: %s", count, reason)
