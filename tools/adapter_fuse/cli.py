"""``adapter-fuse``: learn how trained adapters act together, see what was learnt, stack adapters."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.adapter_fuse.params import ReportParams, StackParams, TrainParams

main = tool_group(
    "adapter-fuse",
    group="train",
    help="Fuse trained adapters by attention or a gate, or stack them; without a subcommand, train.",
    default="train",
)


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Parameter counts for ``--dry-run``, without loading the base's weights."""
    from tuneutils.tools.adapter_fuse.train import plan as counted

    return counted(run)


@tool("train", TrainParams, group="train", inputs="RECORDS", output="adapter", plan=plan, parent=main)
def train(run: Run[TrainParams]) -> Summary:
    """Learn from RECORDS how frozen adapters of one base act together.

    The result is one adapter that holds them all and loads like any other. A killed run goes on from its
    last checkpoint when started again.
    """
    from tuneutils.tools.adapter_fuse.train import train

    return train(run)


@tool(
    "stack", StackParams, group="train", inputs="ADAPTER", output="adapter", stdin=False, uses_model=False,
    parent=main,
)  # fmt: skip
def stack(run: Run[StackParams]) -> Summary:
    """Put bottleneck ADAPTERs of one base on top of each other, the first at the bottom.

    Of an adapter that is itself a stack the top one is taken: LANGUAGE STACK swaps the language under a task.
    """
    from tuneutils.tools.adapter_fuse.stack import stack

    return stack(run)


@tool("report", ReportParams, group="train", inputs="RECORDS", output="report", parent=main)
def report(run: Run[ReportParams]) -> Summary:
    """Show which adapter each layer of a fusion attends to on held-out RECORDS, by domain.

    The loss in each domain is compared with that of the base, of each adapter alone and of their average.
    """
    from tuneutils.tools.adapter_fuse.report import report

    return report(run)


if __name__ == "__main__":
    main()
