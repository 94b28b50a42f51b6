"""``lora-tune``: fine-tune a causal language model by any PEFT method or in full."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool
from tuneutils.tools.lora_tune.params import Params


def plan(run: Run[Params]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.lora_tune.plan import plan as counted

    return counted(run)


@tool("lora-tune", Params, group="train", inputs="RECORDS", output="adapter or model", plan=plan)
def main(run: Run[Params]) -> Summary:
    """Fine-tune a model on RECORDS: text, prompt+completion, messages, or the chosen answers of
    preferences.

    The result is an adapter in PEFT's format, or with --method full a model, with its manifest. A killed
    run goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.lora_tune.tune import tune

    return tune(run)


if __name__ == "__main__":
    main()
