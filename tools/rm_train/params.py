"""The parameters of ``rm-train``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

TEMPLATES = ("auto", "chat", "none")
TOO_LONG = ("error", "truncate", "drop")


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """What decides a reward model (and, where noted, only how the run is done)."""

    model: str = option(help="The model to start from: artifact, folder or Hub id.", short="-m")
    eval: tuple[str, ...] = option(
        (),
        help="Preferences to evaluate on; by default --eval-share of the prompts. Repeatable.",
        metavar="[NAME=]FILE",
    )
    eval_share: float = option(
        0.1, help="Share of the prompts that is held out when there is no --eval.", min=0, max=0.9
    )
    by: str | None = option(None, help="Field by whose values the accuracy is shown too.", metavar="FIELD")
    method: str = option(
        "lora", help="full, lora, ia3, or another of PEFT's methods that can be merged.", metavar="NAME"
    )
    learning_rate: float | None = option(
        None, help="Peak learning rate; 1e-5 for full, else the method's own.", min=0
    )
    epochs: float = option(1.0, help="Passes over the records.", min=0)
    max_steps: int | None = option(None, help="Stop after this many optimizer steps instead.", min=1)
    batch_size: int = option(8, help="Pairs of a micro-batch in each process.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(1024, help="Longest prompt with completion, in tokens.", min=2)
    too_long: str = option(
        "error",
        help="A longer text makes a bad record, loses the start of its prompt, or is dropped.",
        choices=TOO_LONG,
    )
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=TEMPLATES,
    )
    margin_scale: float = option(
        1.0,
        help="Factor of the field margin, which the difference of scores must exceed where no votes are "
        "learnt; 0 ignores it.",
        min=0,
    )
    soft_labels: bool = option(
        True, help="Learn the share of votes (strength, or votes) rather than the majority."
    )
    centre: float = option(
        0.0, help="Weight of (r_chosen + r_rejected)², which keeps scores near zero; 0.01 is usual.", min=0
    )
    normalise: str = option(
        "chosen",
        help="Texts whose scores get mean 0, std 1: chosen or all of the training records, a file, or none.",
        metavar="chosen|all|none|FILE",
    )
    lora_rank: int = option(16, help="Rank of LoRA's and its kin's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    target_modules: tuple[str, ...] = option((), help="Modules to adapt; all linear layers if not given.")
    dora: bool = option(False, help="Weight-decomposed LoRA (Liu et al. 2024).")
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    peft_option: tuple[str, ...] = option((), help="A field of the PEFT config.", metavar="KEY=VALUE")
    merge: bool = option(False, help="Save the adapter merged into its base, as one model.")
    schedule: str = option(
        "linear", help="Learning rate over time.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.05, help="Share of the steps in which the rate rises.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations: less memory, more time.")
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What the methods can do and a reward model does without: dropout off (both of a pair must see one
    # network), and a base in full precision, as whoever loads the artifact has it.
    lora_dropout = 0.0
    pissa = False
    loraplus_ratio = 1.0
    quantization = None
    reduction_factor = 16.0
    virtual_tokens = 0
    adapter_layers = None


@dataclass(frozen=True, kw_only=True)
class ScoreParams:
    """What is scored, and how."""

    model: str = option(help="The reward model: an artifact of rm-train.", short="-m")
    raw: bool = option(False, help="Scores as the head gives them, not normalised.")
    template: str | None = option(
        None, help="As in training; the reward model's own if not given.", choices=TEMPLATES
    )
    max_length: int | None = option(None, help="Longest text, in tokens; the reward model's own.", min=2)
    too_long: str = option(
        "error",
        help="A longer text makes a bad record, or loses the start of its prompt.",
        choices=TOO_LONG[:2],
    )
    batch_size: int = option(16, help="Texts of one forward pass.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    """What an existing reward model is measured on."""

    model: str = option(help="The reward model: an artifact of rm-train.", short="-m")
    by: str | None = option(None, help="Field by whose values the accuracy is shown too.", metavar="FIELD")
    min_accuracy: float | None = option(None, help="Exit 1 when the accuracy is below this.", min=0, max=1)
    template: str | None = option(
        None, help="As in training; the reward model's own if not given.", choices=TEMPLATES
    )
    max_length: int | None = option(None, help="Longest text, in tokens; the reward model's own.", min=2)
    too_long: str = option(
        "error",
        help="A longer text makes a bad record, loses the start of its prompt, or is dropped.",
        choices=TOO_LONG,
    )
    batch_size: int = option(16, help="Texts of one forward pass.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
