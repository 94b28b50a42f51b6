"""``qat-tune``: train a model under the rounding that it will be stored with."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.qat_tune.params import Params


def plan(run: Run[Params]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.qat_tune.plan import plan as counted

    return counted(run)


@tool("qat-tune", Params, group="train", inputs="RECORDS", output="model", plan=plan)
def main(run: Run[Params]) -> Summary:
    """Train a model (-m) on RECORDS with its weights rounded in every forward pass as quantize rounds them.

    By default it learns to give what the float model gives. The result is what quantize writes, a
    compressed-tensors model that from_pretrained loads, with exactly the weights that were trained. A killed
    run goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.qat_tune.qat import qat_tune

    return qat_tune(run)


if __name__ == "__main__":
    main()
