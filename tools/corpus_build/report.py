"""What went in, what was dropped and why, what is left; as JSON, Markdown and a picture."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tuneutils.shared.artifact import Artifact, write_json
from tuneutils.shared.command import Run
from tuneutils.tools.corpus_build.find import Found
from tuneutils.tools.corpus_build.params import BuildParams
from tuneutils.tools.corpus_build.pool import Pool
from tuneutils.tools.corpus_build.split import Split

NAMED = 50


def write_report(
    _run: Run[BuildParams], art: Artifact, pool: Pool, found: Found, made: Split
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
    named = [*found.named, *pool.unreadable]
    write_json(art.dir / "report.json", {**metrics, "left_named": named, "recoded_named": pool.recoded})
    return metrics
