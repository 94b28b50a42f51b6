"""Pairs out of files that hold them already: catalogues, translation memories, line-aligned texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import open_writer
from tuneutils.shared.sources import resolve
from tuneutils.shared.streams import Record
from tuneutils.tools.xl_parallel import catalogues, dictd, exchange, sides
from tuneutils.tools.xl_parallel.params import ExtractParams

_BY_SUFFIX = {
    ".po": "gettext", ".mo": "gettext", ".gmo": "gettext", ".tmx": "tmx", ".xlf": "xliff", ".xliff": "xliff",
    ".srt": "subtitles", ".vtt": "subtitles", ".dz": "dictionary", ".dict": "dictionary",
    ".index": "dictionary",
}  # fmt: skip


def extract(run: Run[ExtractParams]) -> dict[str, Any]:
    """Run ``xl-parallel extract``; returns the summary."""
    params = run.params
    sources = [resolve(source, "dataset") for source in run.inputs]
    inputs = [source.as_input("source", params.licence) for source in sources]
    check_stream(run, inputs)
    paths = [file for source in sources for path in source.paths for file in _files(path)]
    dropped: Counter[str] = Counter()
    written: Counter[str] = Counter()
    seen: set[tuple[str, str, str]] = set()
    with open_writer(str(run.output)) as writer:
        for record in _records(paths, params, dropped):
            reason = _reason(record, params.min_words, seen)
            if reason:
                dropped[reason] += 1
                continue
            written[record["tgt_lang"]] += 1
            writer.write(record)
    if not written:
        shown = ", ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "none in both"
        targets = ", ".join(params.tgt_lang)
        raise ToolError(f"{', '.join(run.inputs)}: no pair {params.src_lang}-{targets} ({shown})")
    metrics = {"pairs": dict(sorted(written.items())), "dropped": dict(sorted(dropped.items()))}
    licences = sorted({i.licence for i in inputs if i.licence})
    origin = inputs[0].source if len(inputs) == 1 else None
    sidecar(
        run, Path(str(run.output)), inputs, metrics=metrics, licence=" AND ".join(licences), source=origin
    )
    lost = "".join(f"; {n} {reason}" for reason, n in dropped.most_common())
    run.log.info("%d pairs of %d files%s", written.total(), len(paths), lost)
    return {"output": run.output, "metrics": metrics}


def _files(path: Path) -> Iterator[Path]:
    """A file, or every file below a folder whose kind its name tells."""
    if not path.is_dir():
        yield path
        return
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in _BY_SUFFIX)
    if not found:
        raise ToolError(
            f"{path}: no catalogue, TMX, XLIFF or subtitles below it", code=ExitCode.MISSING_INPUT
        )
    yield from found


def _reason(record: Record, min_words: int, seen: set[tuple[str, str, str]]) -> str | None:
    """Why a pair is left out, or None."""
    if not record["src"] or not record["tgt"]:
        return "with an empty side"
    if len(record["src"].split()) < min_words:
        return "of too few words"
    key = (record["src"], record["tgt"], record["tgt_lang"])
    if key in seen:
        return "exact duplicates"
    seen.add(key)
    return None


def _records(paths: Sequence[Path], params: ExtractParams, dropped: Counter[str]) -> Iterator[Record]:
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        kinds.setdefault(_kind(path, params.format), []).append(path)
    for kind, some in kinds.items():
        for origin, src, tgt, lang in _pairs(kind, some, params, dropped):
            yield {
                "src": " ".join(src.split()), "tgt": " ".join(tgt.split()),
                "src_lang": params.src_lang, "tgt_lang": lang, "origin": origin,
            }  # fmt: skip


def _kind(path: Path, given: str) -> str:
    if given != "auto":
        return given
    return _BY_SUFFIX.get(path.suffix.lower(), "moses")


def _pairs(
    kind: str, paths: Sequence[Path], params: ExtractParams, dropped: Counter[str]
) -> Iterator[tuple[str, str, str, str]]:
    """``(origin, source, target, target language)`` of one kind of file."""
    if kind == "gettext":
        yield from catalogues.pairs(
            paths, params.src_lang, params.tgt_lang, params.catalogue_lang, params.accelerators
        )
    elif kind in ("tmx", "xliff"):
        for path in paths:
            for unit in exchange.units(path):
                yield from _of_unit(path.stem, unit, params, dropped)
    elif kind == "dictionary":
        for path in paths:
            if path.suffix != ".index":
                for word, translation in dictd.entries(path):
                    yield path.name.partition(".")[0], word, translation, params.tgt_lang[0]
    else:
        yield from _two_files(kind, paths, params)


def _of_unit(
    origin: str, unit: dict[str, str], params: ExtractParams, dropped: Counter[str]
) -> Iterator[tuple[str, str, str, str]]:
    src = _in_language(unit, params.src_lang)
    for lang in params.tgt_lang:
        tgt = _in_language(unit, lang)
        if src is not None and tgt is not None:
            yield origin, src, tgt, lang
        else:
            dropped["without one of the languages"] += 1


def _in_language(unit: dict[str, str], lang: str) -> str | None:
    fitting = [name for name in unit if catalogues.same_language(lang.lower(), name.lower())]
    return unit[min(fitting, key=len)] if fitting else None


def _two_files(
    kind: str, paths: Sequence[Path], params: ExtractParams
) -> Iterator[tuple[str, str, str, str]]:
    """Source file, target file; sides are told by a language in the name where there is one."""
    if len(paths) != 2 or len(params.tgt_lang) != 1:
        names = ", ".join(str(path) for path in paths)
        raise ToolError(
            f"{names}: taken for {kind}, which is one source file and one target file in one language each; "
            "--format says otherwise",
            code=ExitCode.USAGE,
        )
    src, tgt = paths
    if _says(src, params.tgt_lang[0]) and _says(tgt, params.src_lang):
        raise ToolError(
            f"{src.name} is given as {params.src_lang} and {tgt.name} as {params.tgt_lang[0]}; "
            "by their names they are swapped",
            code=ExitCode.USAGE,
        )
    read = sides.moses if kind == "moses" else sides.subtitles
    for left, right in read(src, tgt):
        yield src.name.partition(".")[0], left, right, params.tgt_lang[0]


def _says(path: Path, lang: str) -> bool:
    """Whether a part of the name between dots is this language."""
    return lang in path.name.split(".")[1:]
