"""The parameters of ``lm-bench``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

#: Deterministic costs, and those of the run logs; all are better when lower.
COSTS = {
    "trainable_parameters": "trainable parameters",
    "bytes": "size on disk",
    "bits_per_weight": "bits a weight",
    "forgetting": "forgetting on general text (bits per byte)",
}
RUN_COSTS = {
    "train_s": "training time (s)",
    "train_peak_rss_bytes": "peak memory in training",
    "peak_rss_bytes": "peak memory in inference",
    "decode_ms_per_token": "decode time (ms a token)",
}


@dataclass(frozen=True, kw_only=True)
class Params:
    """What is measured, and how."""

    records: tuple[str, ...] = option(
        (), help="Held-out records: perplexity and bits per byte.", metavar="[NAME=]FILE"
    )
    general: str | None = option(
        None, help="General text; bits per byte lost on it against the baseline is forgetting."
    )
    task: tuple[str, ...] = option(
        (), help="Task file in lm-evaluation-harness's YAML format; with --engine harness also a task's name."
    )
    engine: str = option(
        "own", help="What runs the tasks: this tool, or lm-evaluation-harness.", choices=("own", "harness")
    )
    baseline: str | None = option(
        None, help="The model that others are compared with: a label, or one more model or report."
    )
    max_rise: tuple[str, ...] = option(
        (),
        help="Exit 1 when a metric lies above the baseline's by more than this share, e.g. "
        "heldout:perplexity=0.02. Repeatable.",
        metavar="TASK:METRIC=SHARE",
    )
    reference: str | None = option(
        None,
        help="The original: KL and top-1 agreement of the others with it, on the first --records; a label.",
    )
    reference_tokens: int = option(2048, help="Tokens to compare with the original on.", min=1)
    quality: str | None = option(
        None, help="Metric of the trade-off; by default the first task's.", metavar="TASK:METRIC"
    )
    cost: tuple[str, ...] = option(
        (),
        help="Costs that the plots and Pareto fronts are drawn over; all that are known if not given.",
        choices=(*COSTS, *RUN_COSTS),
    )
    limit: int | None = option(None, help="Only the first records and questions of each set.", min=1)
    num_fewshot: int | None = option(None, help="Examples before each question; the task's own.", min=0)
    cluster: str | None = option(
        None, help="Field whose equal values are resampled together (such as the source document)."
    )
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    max_length: int = option(2048, help="Tokens that a model sees at once; its own limit if lower.", min=2)
    stride: int | None = option(
        None, help="New tokens of each further window of a longer text; max-length if not given.", min=1
    )
    batch_tokens: int = option(4096, help="Padded tokens of one forward pass.", min=1)
    generate: int = option(
        0, help="Prompts of the records to answer greedily: stop rate, length, repetition.", min=0
    )
    max_new_tokens: int = option(64, help="Longest answer to those prompts.", min=1)
    answer_pattern: str | None = option(
        None, help="Regular expression whose first match in an answer is compared with the completion's."
    )
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")
    speed: bool = option(False, help="Also measure speed and memory, each model alone.", role="runtime")
    speed_prompt: tuple[int, ...] = option(
        (256,), help="Prompt lengths, in tokens, to measure speed at.", role="runtime"
    )
    speed_batch: tuple[int, ...] = option((1,), help="Batch sizes to measure speed at.", role="runtime")
    speed_tokens: int = option(32, help="Tokens to decode when measuring speed.", min=2, role="runtime")
    bandwidth: bool = option(
        True,
        help="With --speed, measure the memory bandwidth too: the share of it that decoding reaches.",
        role="runtime",
    )
    repeats: int = option(5, help="Repeats of a speed measurement; the median counts.", min=1, role="runtime")
    csv: str | None = option(None, help="Also write the table here, or to stdout (-).", role="runtime")
