"""``cf-augment RECORDS... -o FILE|-``: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.cf_augment.params import EvalParams, WriteParams

main = tool_group(
    "cf-augment",
    group="data",
    help="Write counterfactual twins of records; without a subcommand, write.",
    default="write",
)


@tool(
    "write", WriteParams, group="data", inputs="RECORDS", output="record stream", streams=True,
    uses_model=False, parent=main,
)  # fmt: skip
def write(run: Run[WriteParams]) -> Summary:
    """Write RECORDS with counterfactual twins: the same texts about people of another group.

    Names, pronouns and nouns of one person change together, verbs and articles agree, casing, chat roles,
    labels and spans are kept, code and addresses left alone. A twin has the source's id in twin_of
    and what was swapped in twin_axis. Where the text does not decide, there is no twin; the reason is
    counted, shown by --report and kept by --abstained.
    """
    from tuneutils.tools.cf_augment.augment import augment

    return augment(run)


@tool("eval", EvalParams, group="data", inputs="GOLD", output="report", uses_model=False, parent=main)
def evaluate(run: Run[EvalParams]) -> Summary:
    """Compare twins with GOLD: records of a text and its counterpart in swapped.

    Where swapped equals the text nothing should change; where it is null there should be no twin. Writes
    report.json (exact match, agreement errors, name consistency, false swaps, with intervals) and
    errors.jsonl.
    """
    from tuneutils.tools.cf_augment.evaluate import evaluate

    return evaluate(run)


if __name__ == "__main__":
    main()
