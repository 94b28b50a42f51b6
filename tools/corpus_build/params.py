"""The parameters of ``corpus-build`` and its subcommands."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.shared.pii import KINDS
from tuneutils.tools.corpus_build.names import FAMILIES, QUESTIONS, RULES

HASHES = ("fast", "sha256")
PERPLEXITY_BUCKETS = ("head", "middle", "tail")


@dataclass(frozen=True, kw_only=True)
class BuildParams:
    """What is read, what is dropped, what is chosen."""

    text_field: str = option("text", help="JSONL and Parquet: the field that holds the text.")
    licence: str | None = option(None, help="Licence of what declares none.")
    rule: tuple[str, ...] = option(
        FAMILIES, help="Quality rules, by name or family. Repeatable.", choices=(*FAMILIES, *RULES)
    )
    no_rule: tuple[str, ...] = option(
        ("c4-terminal-punctuation", "c4-short-lines", "c4-curly-bracket"),
        help="Rules to leave out; by default those that cost code, lists and tables. 'none' leaves out none. "
        "Repeatable.",
        choices=(*RULES, "none"),
    )
    language: tuple[str, ...] = option(
        (), help="Keep only texts in this language (ISO 639-1). Repeatable.", metavar="CODE"
    )
    language_score: float = option(0.5, help="Least probability of the language.", min=0, max=1)
    identify: bool = option(True, help="Note every text's language, also where all are kept.")
    mask: tuple[str, ...] = option(
        KINDS, help="Personal data to mask; 'none' for nothing. Repeatable.", choices=(*KINDS, "none")
    )
    min_characters: int = option(1, help="Drop shorter texts.", min=1)
    max_document_bytes: int = option(
        512 << 10,
        help="Cut longer texts at paragraph ends; the pieces stay on one side of the split.",
        min=1024,
    )
    max_file_bytes: int = option(
        64 << 20, help="Most bytes of an HTML, PDF or packed file, unpacked; a larger one is left and named.",
        min=1024,
    )  # fmt: skip
    near: float = option(
        0.8, help="Drop a text this similar (Jaccard of word 5-grams) to a kept one; 0: exact copies alone.",
        min=0, max=1,
    )  # fmt: skip
    substring_words: int = option(
        50, help="Cut stretches of this many words that occurred before; 0 cuts none.", min=0
    )
    decontaminate: tuple[str, ...] = option(
        (), help="Record stream of a benchmark: texts that share 13 words in a row with it are dropped. "
        "Repeatable.", metavar="RECORDS",
    )  # fmt: skip
    target: tuple[str, ...] = option(
        (),
        help="Record stream that shows the domain, to select towards (DSIR). Repeatable.",
        metavar="RECORDS",
    )
    select: float | None = option(None, help="With --target: share of the documents to draw.", min=0, max=1)
    dsir_hash: str = option(
        "fast", help="Hash of the n-grams; sha256 chooses as the package data-selection does.", choices=HASHES
    )
    perplexity_model: str | None = option(
        None, help="Model that sorts the texts into three equal buckets of perplexity.", metavar="MODEL"
    )
    perplexity_keep: tuple[str, ...] = option(
        ("head", "middle"),
        help="Buckets to keep; head is the likeliest third. Repeatable.",
        choices=PERPLEXITY_BUCKETS,
    )
    heldout: float = option(0.1, help="Share of the documents to hold out, by source file.", min=0, max=0.9)
    train_bytes: int | None = option(
        None, help="Stop the train stream at this size; a smaller one is a part of a larger one.", min=1
    )
    general: tuple[str, ...] = option(
        (), help="Record stream of general text, to tell the domain's own words from. Repeatable.",
        metavar="RECORDS",
    )  # fmt: skip
    workers: int = option(
        0, help="Processes; 0 is one for each CPU. Changes no result.", min=0, role="runtime"
    )
    executor: str = option(
        "processes", help="Where the workers run: on this machine, or by Ray Data.",
        choices=("processes", "ray"), role="runtime",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchmarkParams:
    """How many questions, and about which words."""

    items: int = option(200, help="Most questions to make.", min=1)
    per_document: int = option(5, help="Most questions about one document.", min=1)
    general: tuple[str, ...] = option(
        (), help="Record stream of general text: only the domain's own words are then asked for. Repeatable.",
        metavar="RECORDS",
    )  # fmt: skip
    name: str = option("domain", help="Name of the tasks: NAME_choice and NAME_cloze.")


@dataclass(frozen=True, kw_only=True)
class QuestionParams:
    """Which questions are made, and whether a model writes and checks them."""

    kind: tuple[str, ...] = option(
        QUESTIONS, help="Kinds of question to make by rules. Repeatable.", choices=QUESTIONS
    )
    per_document: int = option(8, help="Most questions that the rules make of one record.", min=1)
    limit: int | None = option(None, help="Most questions in all, drawn at random.", min=1)
    with_passage: bool = option(
        False, help="Put the passage before the question; without it, the answer must be known."
    )
    model: str | None = option(
        None, help="Model that writes questions of its own and must give back every answer.", short="-m",
        metavar="MODEL",
    )  # fmt: skip
    model_passages: int = option(200, help="Most passages that the model asks about.", min=1)
    per_passage: int = option(2, help="Questions that the model writes about each.", min=1)
    agreement: float = option(
        0.6, help="Least F1 between an answer and the one that comes back.", min=0, max=1
    )
    max_new_tokens: int = option(48, help="Longest reply of the model.", min=1)
