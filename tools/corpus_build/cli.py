"""``corpus-build [build|questions|benchmark] INPUT... -o DIR``: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.corpus_build.params import BenchmarkParams, BuildParams, QuestionParams

main = tool_group(
    "corpus-build",
    group="data",
    help="Make a domain corpus of raw files, questions and a benchmark; without a subcommand, build.",
    default="build",
)


@tool("build", BuildParams, group="data", inputs="SOURCE", output="corpus", parent=main)
def build(run: Run[BuildParams]) -> Summary:
    """Clean, deduplicate, select and split the texts of SOURCE.

    SOURCE is a folder, a file (text, Markdown, HTML, PDF, manual page, JSONL, Parquet; also packed as .gz or
    .zst), any other source that data-import takes, or - for JSONL on stdin. Writes train.jsonl and
    heldout.jsonl with the path, offset, hash and licence of every text, dropped.jsonl with reasons, a report.
    """
    from tuneutils.tools.corpus_build.build import build as make

    return make(run)


@tool("questions", QuestionParams, group="data", inputs="RECORDS", output="questions", parent=main)
def questions(run: Run[QuestionParams]) -> Summary:
    """Make instruction records of the text of RECORDS, such as a corpus's train.jsonl.

    Rules find definitions, causes, dates, conditions, sections, titles and summaries. With --model the model
    also writes questions, and every answer must come back from it when it is asked with the passage. Each
    record has its passage, and path, offset and licence of its source.
    """
    from tuneutils.tools.corpus_build.ask import ask

    return ask(run)


@tool(
    "benchmark", BenchmarkParams, group="data", inputs="CORPUS", many=False, stdin=False, output="benchmark",
    uses_model=False, parent=main,
)  # fmt: skip
def benchmark(run: Run[BenchmarkParams]) -> Summary:
    """Make a benchmark of the held-out documents of CORPUS, a folder that build wrote.

    Writes items.jsonl, task files of lm-evaluation-harness (choice.yaml, cloze.yaml) for lm-bench --task, and
    sample.md to read. A hidden word is one that the train documents can teach; its sentence is not in them.
    """
    from tuneutils.tools.corpus_build.benchmark import make

    return make(run)


if __name__ == "__main__":
    main()
