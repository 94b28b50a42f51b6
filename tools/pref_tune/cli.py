"""``pref-tune``: value alignment without reinforcement learning."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.pref_tune.params import ConstitutionParams, TrainParams

main = tool_group(
    "pref-tune",
    group="train",
    help="Align a model with preferences, or with a constitution; without a subcommand, train.",
    default="train",
)


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.pref_tune.plan import plan as counted

    return counted(run)


@tool(
    "train", TrainParams, group="train", inputs="RECORDS", output="adapter or model", plan=plan, parent=main
)
def train(run: Run[TrainParams]) -> Summary:
    """Align a model with RECORDS: prompt+chosen+rejected, with margin, strength or votes if there are; for
    --loss kto also prompt+completion+label.

    The result is an adapter in PEFT's format, or with --method full a model, with its manifest and a report:
    held-out margins, KL and win rate against the model it started from, and what was forgotten. A killed
    run goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.pref_tune.train import train

    return train(run)


@tool(
    "constitution",
    ConstitutionParams,
    group="train",
    inputs="PROMPTS",
    output="preferences",
    streams=True,
    parent=main,
)
def constitution(run: Run[ConstitutionParams]) -> Summary:
    """Make preferences of PROMPTS by a constitution: prompt, or any record that has one or messages.

    The model drafts an answer, names what in it goes against a principle drawn for it, and writes it anew:
    the revision is chosen, the draft rejected. Pairs that teach nothing (revision empty, cut off, equal to
    the draft, repeating itself, the critique or the request) are dropped and counted by reason.
    """
    from tuneutils.tools.pref_tune.draft import draft

    return draft(run)


if __name__ == "__main__":
    main()
