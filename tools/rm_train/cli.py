"""``rm-train``: a reward model from preferences; how good an existing one is; and its scores of texts."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.shared.exits import out_of_memory
from tuneutils.tools.rm_train.params import EvalParams, ScoreParams, TrainParams

main = tool_group(
    "rm-train",
    group="train",
    help="Train a reward model on preferences; without a subcommand, train.",
    default="train",
)


def plan(run: Run[TrainParams]) -> dict[str, Any]:
    """Parameter counts and a memory estimate for ``--dry-run``, without loading weights."""
    from tuneutils.tools.rm_train.plan import plan as counted

    return counted(run)


@tool("train", TrainParams, group="train", inputs="RECORDS", output="reward model", plan=plan, parent=main)
def train(run: Run[TrainParams]) -> Summary:
    """Train a reward model on RECORDS: prompt+chosen+rejected, with margin, strength or votes if there are.

    The result is an adapter in PEFT's format, or with --method full or --merge a sequence classifier with
    one label, with its normalisation, its evaluation on held-out prompts and its manifest. A killed run
    goes on from its last checkpoint when started again.
    """
    from tuneutils.tools.rm_train.train import train

    params = run.params
    size, steps = params.batch_size, params.gradient_accumulation
    advice = f"--batch-size {size // 2} --gradient-accumulation {2 * steps} (now {size} and {steps})"
    if size == 1:
        advice = f"--gradient-checkpointing, or a --max-length below {params.max_length}"
    with out_of_memory(advice):
        return train(run)


@tool(
    "score", ScoreParams, group="train", inputs="RECORDS", output="scored records", streams=True, parent=main
)
def score(run: Run[ScoreParams]) -> Summary:
    """Add a reward model's scores to RECORDS.

    prompt+completion and messages get score; prompt+chosen+rejected get score_chosen and score_rejected;
    prompt+completion_a+completion_b get score_a and score_b.
    """
    from tuneutils.tools.rm_train.score import score

    with out_of_memory(smaller(run.params.batch_size)):
        return score(run)


@tool("eval", EvalParams, group="train", inputs="RECORDS", output="report", parent=main)
def evaluate(run: Run[EvalParams]) -> Summary:
    """Measure a reward model on RECORDS: preferences, or prompt+completions with their rewards.

    Exits 1 when the accuracy is below --min-accuracy.
    """
    from tuneutils.tools.rm_train.evaluate import evaluate

    with out_of_memory(smaller(run.params.batch_size)):
        return evaluate(run)


def smaller(batch_size: int) -> str:
    """What to try when forward passes of so many texts do not fit into memory."""
    return f"--batch-size {batch_size // 2}" if batch_size > 1 else "a lower --max-length"


if __name__ == "__main__":
    main()
