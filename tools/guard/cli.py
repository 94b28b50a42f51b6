"""``guard``: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.guard.params import CheckParams, EvalParams, ProbeParams, RunParams, TrainParams

main = tool_group(
    "guard",
    group="evaluate",
    help="Guardrails learnt from one model's own failures; without a subcommand, check.",
    default="check",
)


@tool("probe", ProbeParams, group="evaluate", inputs="PROBES", output="log", streams=True, parent=main)
def probe(run: Run[ProbeParams]) -> Summary:
    """Run PROBES on a model and write its replies, each with label: true where it is acceptable.

    A probe is a prompt with fails: complies (the default: the reply is no refusal), contains:TEXT,
    lacks:TEXT, matches:REGEX, personal-data, or never (a harmless request). builtin:train and
    builtin:heldout are probes that come along, of different templates.
    """
    from tuneutils.tools.guard.probe import probe

    return probe(run)


@tool("train", TrainParams, group="evaluate", inputs="RECORDS", output="guard", parent=main)
def train(run: Run[TrainParams]) -> Summary:
    """Learn a guard for a model from RECORDS: exchanges with a label, or probes, which are run first.

    A linear probe on the model's activations, and a small classifier of the text for what it raises. The
    threshold is set so that of harmless exchanges at most --budget are expected to be flagged.
    """
    from tuneutils.tools.guard.train import train

    return train(run)


@tool(
    "check", CheckParams, group="evaluate", inputs="RECORDS", output="record stream", streams=True,
    parent=main,
)  # fmt: skip
def check(run: Run[CheckParams]) -> Summary:
    """Judge the last reply of each of RECORDS, or its prompt where there is none, and add a verdict.

    The field guard holds flagged, layer, score, category and at: the tokens of the reply when it turned.
    """
    from tuneutils.tools.guard.check import check

    return check(run)


@tool("run", RunParams, group="evaluate", inputs="PROMPTS", output="record stream", streams=True, parent=main)
def generate(run: Run[RunParams]) -> Summary:
    """Reply to PROMPTS under guard: a reply that turns is stopped where it does."""
    from tuneutils.tools.guard.generate import generate

    return generate(run)


@tool("eval", EvalParams, group="evaluate", inputs="RECORDS", output="report", parent=main)
def evaluate(run: Run[EvalParams]) -> Summary:
    """Measure a guard on labelled RECORDS that it has not seen: recall, false alarms, calibration.

    Exits 1 when the recall is below --min-recall or false alarms are above --max-false-positives.
    """
    from tuneutils.tools.guard.evaluate import evaluate

    return evaluate(run)


if __name__ == "__main__":
    main()
