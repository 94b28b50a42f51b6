"""``prune``: a model with less in it, and what that cost."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.prune.params import Params


def plan(run: Run[Params]) -> dict[str, Any]:
    """What would be removed, for ``--dry-run``, without loading weights."""
    from tuneutils.tools.prune.plan import plan as counted

    return counted(run)


@tool("prune", Params, group="compress", inputs="RECORDS", output="model", plan=plan)
def main(run: Run[Params]) -> Summary:
    """Prune the model (-m), scored on RECORDS: text, prompt+completion, or messages.

    Single weights become zeros; heads, channels and layers are cut out, which leaves a smaller plain model.
    Recover with distill or lora-tune.
    """
    from tuneutils.tools.prune.prune import prune

    return prune(run)


if __name__ == "__main__":
    main()
