"""What went in, what was dropped and why, what is left; as JSON, Markdown and a picture."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from typing import Any

from tuneutils.shared.artifact import Artifact, write_json
from tuneutils.shared.command import Run
from tuneutils.shared.records import Reader
from tuneutils.tools.corpus_build.contamination import strings
from tuneutils.tools.corpus_build.find import Found
from tuneutils.tools.corpus_build.params import BuildParams
from tuneutils.tools.corpus_build.pool import Pool
from tuneutils.tools.corpus_build.split import Split
from tuneutils.tools.corpus_build.vocabulary import FUNCTION_WORDS, log_odds, lower_counts

NAMED = 50
WORDS = 40


def write_report(
    run: Run[BuildParams], art: Artifact, pool: Pool, found: Found, made: Split
) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and the plot; set the artifact's metrics and licence."""
    licences = Counter(str(pool.record(d).get("licence") or "unknown") for d in [*made.train, *made.heldout])
    left = found.left.copy()
    for entry in pool.unreadable:
        left[entry["reason"]] += 1
    bytes_of = {side: (art.dir / f"{side}.jsonl").stat().st_size for side in ("train", "heldout")}
    characters = {
        "train": sum(int(pool.sizes[d]) for d in made.train),
        "heldout": sum(int(pool.sizes[d]) for d in made.heldout),
    }
    metrics = {
        "files": found.files,
        "file_bytes": found.bytes,
        "files_left": dict(left.most_common()),
        "kinds": dict(sorted(pool.kinds.items())),
        "documents": pool.read,
        "characters": pool.read_bytes,
        "dropped": dict(pool.dropped.most_common()),
        "dropped_characters": dict(pool.dropped_bytes.most_common()),
        "lines_removed": dict(pool.removed_lines.most_common()),
        "repeated_characters_cut": pool.cut_characters,
        "masked": dict(sorted(pool.masked.items())),
        "languages": dict(pool.languages.most_common()),
        "recoded_files": len(pool.recoded),
        "train_documents": len(made.train),
        "heldout_documents": len(made.heldout),
        "unused_documents": made.unused,
        "stream_bytes": bytes_of,
        "kept_characters": characters,
        "licences": dict(licences.most_common()),
    }
    art.metrics = metrics
    art.licence = " AND ".join(name for name, _ in licences.most_common())
    words = _own_words(run, art)
    named = [*found.named, *pool.unreadable]
    write_json(
        art.dir / "report.json",
        {**metrics, "left_named": named, "recoded_named": pool.recoded, "domain_words": dict(words)},
    )
    fates = [("train", characters["train"]), ("held out", characters["heldout"])]
    fates += [(reason, count) for reason, count in pool.dropped_bytes.most_common() if count]
    (art.dir / "report.md").write_text(_markdown(metrics, named, words), encoding="utf-8")
    (art.dir / "plots").mkdir()
    rows = "".join(f"{name},{count}\n" for name, count in fates)
    (art.dir / "plots" / "characters.csv").write_text("fate,characters\n" + rows, encoding="utf-8")
    if find_spec("matplotlib"):
        from tuneutils.tools.corpus_build.plot import draw

        draw(fates, words[:20], art.dir / "plots" / "report.png")
    return metrics


def _own_words(run: Run[BuildParams], art: Artifact) -> list[tuple[str, float]]:
    """The words that tell the train documents from general text most clearly, with their z-scores."""
    if not run.params.general:
        return []
    domain = lower_counts(r["text"] for r in Reader([art.dir / "train.jsonl"], allow_empty=True))
    general = lower_counts(text for r in Reader(list(run.params.general)) for text in strings(r))
    own = [(word, round(z, 2)) for word, z in log_odds(domain, general) if z >= 1.96]
    return [(w, z) for w, z in own if len(w) > 2 and w not in FUNCTION_WORDS][:WORDS]


def _markdown(metrics: dict[str, Any], named: list[dict[str, str]], words: list[tuple[str, float]]) -> str:
    lines = [
        "# Corpus",
        "",
        f"{metrics['files']} files of {metrics['file_bytes']:,} bytes gave {metrics['documents']} documents: "
        f"{metrics['train_documents']} to train on, {metrics['heldout_documents']} held out.",
        "",
        "| dropped because of | documents | characters |",
        "|---|---|---|",
    ]
    for reason, count in metrics["dropped"].items():
        lines.append(f"| {reason} | {count} | {metrics['dropped_characters'].get(reason, 0):,} |")
    for title, key in (
        ("Lines taken out, by rule", "lines_removed"),
        ("Personal data masked", "masked"),
        ("Languages", "languages"),
        ("Licences", "licences"),
    ):
        if metrics[key]:
            lines += [
                "",
                f"{title}: " + ", ".join(f"{name} {count}" for name, count in metrics[key].items()) + ".",
            ]
    if metrics["repeated_characters_cut"]:
        lines += ["", f"Repeats cut: {metrics['repeated_characters_cut']:,} characters."]
    if words:
        shown = ", ".join(f"{word} ({z})" for word, z in words)
        lines += [
            "",
            "The domain's own words, by the z-score of their log-odds against general text: " + shown + ".",
        ]
    if named:
        lines += ["", f"Files left, the first {NAMED} of {len(named)}:", ""]
        lines += [f"- `{entry['path']}`: {entry['reason']}" for entry in named[:NAMED]]
    return "\n".join(lines) + "\n"
