"""``distill``: a smaller student learns from a teacher's distributions, layers or words."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.distill.params import Params


def plan(run: Run[Params]) -> dict[str, Any]:
    """The student's shape and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.distill.plan import plan as counted

    return counted(run)


@tool("distill", Params, group="train", inputs="RECORDS", output="model", plan=plan)
def main(run: Run[Params]) -> Summary:
    """Distil the teacher (-m) into a student on RECORDS: text, prompt+completion, or messages.

    The student is cut from the teacher by --student-layers and the like, or given by --student. The result
    is a plain model with a report of what it kept. A killed run goes on from its last checkpoint when
    started again.
    """
    from tuneutils.tools.distill.distill import distill

    return distill(run)


if __name__ == "__main__":
    main()
