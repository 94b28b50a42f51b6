"""``pref-collect serve|tokens|generate|simulate|report|export``: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.pref_collect.params import (
    ExportParams,
    GenerateParams,
    ReportParams,
    ServeParams,
    SimulateParams,
    TokensParams,
)

main = tool_group(
    "pref-collect",
    group="data",
    help="Collect human preferences and ratings in a web page, judge their quality and export them.",
)


@tool(
    "serve", ServeParams, group="data", inputs="CANDIDATES", stdin=False, uses_model=False, parent=main,
)  # fmt: skip
def serve(run: Run[ServeParams]) -> Summary:
    """Serve the page on which raters compare two completions or rate one.

    CANDIDATES are records with prompt, completion_a and completion_b, or prompt, chosen and rejected; to
    rate, prompt and completion. The same command again goes on where it stopped. Ctrl-C ends it.
    """
    _needs("sqlalchemy", "starlette", "uvicorn", "jinja2", "python_multipart")
    from tuneutils.tools.pref_collect.serve import serve as start

    return start(run)


@tool(
    "tokens", TokensParams, group="data", inputs="RATER", stdin=False, uses_model=False, parent=main,
)  # fmt: skip
def tokens(run: Run[TokensParams]) -> Summary:
    """Make login tokens for raters and print them, once: only their hashes are kept."""
    _needs("sqlalchemy")
    from tuneutils.tools.pref_collect.raters import print_tokens

    return print_tokens(run)


@tool(
    "generate", GenerateParams, group="data", inputs="PROMPTS", output="candidates", streams=True,
    parent=main,
)  # fmt: skip
def generate(run: Run[GenerateParams]) -> Summary:
    """Sample two completions of each prompt (one with --completions 1) and select pairs to be rated."""
    from tuneutils.tools.pref_collect.generate import generate as make

    return make(run)


@tool(
    "simulate", SimulateParams, group="data", inputs="CANDIDATES", output="votes", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def simulate(run: Run[SimulateParams]) -> Summary:
    """Let simulated raters with a stated rule and noise answer; every row says that they are simulated."""
    _needs("sqlalchemy")
    from tuneutils.tools.pref_collect.simulate import simulate as answer

    return answer(run)


@tool(
    "report", ReportParams, group="data", inputs="STUDY", many=False, output="report", uses_model=False,
    parent=main,
)  # fmt: skip
def report(run: Run[ReportParams]) -> Summary:
    """Report the quality of a study's votes: agreement, bias, consistency, gold accuracy, time.

    STUDY is a database (file or URL) or a stream of votes.
    """
    _needs("sqlalchemy", "jinja2")
    from tuneutils.tools.pref_collect.report import report as make

    return make(run)


@tool(
    "export", ExportParams, group="data", inputs="STUDY", many=False, output="record stream", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def export(run: Run[ExportParams]) -> Summary:
    """Export a study's votes as records for training.

    STUDY is a database (file or URL) or a stream of votes.
    """
    _needs("sqlalchemy")
    from tuneutils.tools.pref_collect.export import export as make

    return make(run)


def _needs(*modules: str) -> None:
    from tuneutils.shared.errors import require

    for module in modules:
        require(module, "collect")


if __name__ == "__main__":
    main()
