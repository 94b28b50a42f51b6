"""``ppo-run``: reinforcement learning from a reward by PPO, and the doctor that looks before it leaps."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.ppo_run.compare_params import CompareParams
from tuneutils.tools.ppo_run.params import Params

main = tool_group(
    "ppo-run",
    group="train",
    help="Align a model with a reward by PPO; without a subcommand, train.",
    default="train",
)


def plan(run: Run[Params]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.ppo_run.plan import plan as counted

    return counted(run)


@tool("train", Params, group="train", inputs="PROMPTS", output="adapter or model", plan=plan, parent=main)
def train(run: Run[Params]) -> Summary:
    """Train a model by PPO on PROMPTS: prompt, or any record that has one or messages.

    The result is an adapter in PEFT's format, or with --method full a model, with its manifest. A killed
    run goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.ppo_run.train import train

    return train(run)


@tool("doctor", Params, group="train", inputs="PROMPTS", parent=main)
def doctor(run: Run[Params]) -> Summary:
    """Check a model, a reward and PROMPTS for what makes PPO fail, before any training.

    Takes the options of the run that is to come; exits 1 when a check fails.
    """
    from tuneutils.tools.ppo_run.doctor import examine

    return examine(run)


@tool("compare", CompareParams, group="train", inputs="POLICIES", stdin=False, output="report", parent=main)
def compare(run: Run[CompareParams]) -> Summary:
    """Answer the same prompts with POLICIES ([NAME=]PATH, the first the one the others started from).

    Gives reward, gold reward, win rate, KL, forgetting and the texts side by side, with intervals.
    """
    from tuneutils.tools.ppo_run.compare import compare

    return compare(run)


if __name__ == "__main__":
    main()
