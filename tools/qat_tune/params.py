"""The parameters of ``qat-tune``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the result (and, where noted, only how the run goes)."""

    model: str = option(help="The model to train: an artifact or folder in full precision.", short="-m")
    heldout: str | None = option(None, help="Records on which float, rounded and trained are compared.")
    bits: int = option(4, help="Bits of a weight.", min=2, max=8)
    group_size: int = option(64, help="Neighbours of a row that share a scale; 0: whole rows.", min=0)
    symmetric: bool = option(False, help="No zero points.")
    activations: str = option(
        "float",
        help="Inputs of the matrices: as they are, or rounded to int8 token by token (needs --symmetric).",
        choices=("float", "int8"),
    )
    learn_scales: bool = option(
        False, help="Learn the scales too (LSQ, Esser et al. 2020); else they follow each group's range."
    )
    skip: tuple[str, ...] = option(
        (), help="Matrices left in full precision, by shell pattern such as '*.down_proj'.", metavar="PATTERN"
    )
    method: str = option(
        "full", help="Train the matrices themselves, or LoRA inside their rounding.", choices=("full", "lora")
    )
    lora_rank: int = option(16, help="Rank of LoRA's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    loss: str = option(
        "forward-kl",
        help="What is learnt: the float model's distributions, or the labels alone (ce).",
        choices=("forward-kl", "reverse-kl", "jsd", "ce"),
    )
    teacher: str | None = option(
        None, help="Another float model to learn from, of the same vocabulary; the model itself if not given."
    )
    temperature: float = option(1.0, help="Softens both distributions; the loss is times its square.", min=0)
    ce_weight: float = option(0.0, help="Weight of the labels' cross-entropy beside the divergence.", min=0)
    learning_rate: float | None = option(None, help="Peak learning rate; by method if not given.", min=0)
    scale_learning_rate: float | None = option(
        None, help="Peak rate of learnt scales, as a share of their size; by default 1e-3.", min=0
    )
    epochs: float = option(1.0, help="Passes over the records.", min=0)
    max_steps: int | None = option(None, help="Stop after this many optimizer steps instead.", min=1)
    batch_size: int = option(8, help="Examples of a micro-batch.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(256, help="Longest example, in tokens.", min=2)
    too_long: str = option(
        "error",
        help="A longer example is a bad record, is cut at the end, or dropped; plain text is always split.",
        choices=("error", "truncate", "drop"),
    )
    learn: str = option("completion", help="Which tokens are learnt.", choices=("completion", "last", "all"))
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    schedule: str = option(
        "cosine", help="Learning rate over time.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.05, help="Share of the steps in which the rate rises.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    dtype_stored: str = option(
        "auto",
        help="Precision of what is not quantized; auto: as it is, but bfloat16 for float32.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What training can do and this tool does without.
    gradient_checkpointing = False
