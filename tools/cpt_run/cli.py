"""``cpt-run``: continual pre-training of a causal language model on domain text."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.cpt_run.params import Params


def plan(run: Run[Params]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.cpt_run.plan import plan as counted

    return counted(run)


@tool("cpt-run", Params, group="train", inputs="RECORDS", output="model or adapter", plan=plan)
def main(run: Run[Params]) -> Summary:
    """Go on pre-training a model on RECORDS, the text of a domain or of a task; every token is learnt.

    The result is a model, or with a PEFT --method an adapter, with a report of what was gained on --eval
    and forgotten on --general. A killed run goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.cpt_run.pretrain import pretrain

    return pretrain(run)


if __name__ == "__main__":
    main()
