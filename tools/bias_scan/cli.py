"""``bias-scan data RECORDS… -o REPORT`` and its kin: see README.md."""

from __future__ import annotations

from tuneutils.shared.command import Run, Summary, tool, tool_group
from tuneutils.tools.bias_scan.models.params import LeakParams, ModelParams, PredictionParams
from tuneutils.tools.bias_scan.params import CompareParams, DataParams

main = tool_group(
    "bias-scan",
    group="data",
    help="Measure bias in a data set or in a model, every score with its formula, n and interval.",
)


@tool("data", DataParams, group="data", inputs="RECORDS", output="report", uses_model=False, parent=main)
def data(run: Run[DataParams]) -> Summary:
    """Scan RECORDS for groups of people: how often each is named, and which words stand near it.

    Streams any record format in bounded memory. Writes report.json for machines, index.html for people,
    and plots. Every score has its formula, n and a 95 % interval and is refused below a minimum n.
    """
    from tuneutils.shared.errors import require

    for module in ("ahocorasick", "jinja2", "matplotlib"):
        require(module, "scan")
    from tuneutils.tools.bias_scan.scan_data import scan_data

    return scan_data(run)


@tool(
    "compare",
    CompareParams,
    group="data",
    inputs="BEFORE AFTER",
    stdin=False,
    output="report",
    uses_model=False,
    parent=main,
)
def compare(run: Run[CompareParams]) -> Summary:
    """Show the report BEFORE against the report AFTER: each score's difference with its interval."""
    from tuneutils.shared.errors import require

    for module in ("jinja2", "matplotlib"):
        require(module, "scan")
    from tuneutils.tools.bias_scan.compare import compare_reports

    return compare_reports(run)


@tool("model", ModelParams, group="data", inputs="MODELS", stdin=False, output="report", parent=main)
def model(run: Run[ModelParams]) -> Summary:
    """Put published tests of bias to MODELS ([LABEL=]PATH): causal, masked, rewards, classifiers, vectors.

    Writes report.json, index.html, plots and items.jsonl.gz. With --baseline the others are compared with
    it item by item, with paired intervals.
    """
    from tuneutils.shared.errors import require

    for module in ("jinja2", "matplotlib"):
        require(module, "scan")
    from tuneutils.tools.bias_scan.models.scan import scan_models

    return scan_models(run)


@tool(
    "predictions",
    PredictionParams,
    group="data",
    inputs="RECORDS",
    output="report",
    uses_model=False,
    parent=main,
)
def predictions(run: Run[PredictionParams]) -> Summary:
    """Measure the fairness of predictions in RECORDS ([LABEL=]PATH), whoever made them.

    Records with a group: parity of selection and equalised odds. Records that cf-augment made twins of:
    how many predictions, or scores, change with the twin.
    """
    from tuneutils.shared.errors import require

    for module in ("jinja2", "matplotlib"):
        require(module, "scan")
    from tuneutils.tools.bias_scan.models.predictions import scan_predictions

    return scan_predictions(run)


@tool(
    "leaks",
    LeakParams,
    group="data",
    inputs="TRAIN",
    output="leaks found",
    streams=True,
    uses_model=False,
    parent=main,
)
def leaks(run: Run[LeakParams]) -> Summary:
    """Look in TRAIN records for texts of test sets, exact or nearly so; one record for each text found."""
    from tuneutils.tools.bias_scan.models.leaks import find_leaks

    return find_leaks(run)


if __name__ == "__main__":
    main()
