"""The parameters of ``lora-tune``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.shared.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the result of a fine-tuning run (and, where noted, only how it is run)."""

    model: str = option(help="The model to tune: artifact, folder, GGUF or Hub id.", short="-m")
    heldout: str | None = option(None, help="Records on which the held-out loss is measured.")
    method: str = option(
        "lora", help=f"{', '.join(METHODS)}, or any PEFT method by its name.", metavar="NAME"
    )
    under: str | None = option(
        None,
        help="A bottleneck adapter that the new one is trained on top of, such as a language's (MAD-X).",
        metavar="ADAPTER",
    )
    learning_rate: float | None = option(None, help="Peak learning rate; by method if not given.", min=0)
    epochs: float = option(1.0, help="Passes over the records.", min=0)
    max_steps: int | None = option(None, help="Stop after this many optimizer steps instead.", min=1)
    batch_size: int = option(8, help="Examples of a micro-batch in each process.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(512, help="Longest example, in tokens.", min=2)
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
    lora_rank: int = option(16, help="Rank of LoRA's and its kin's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    lora_dropout: float = option(0.0, help="Dropout on LoRA's input.", min=0, max=1)
    target_modules: tuple[str, ...] = option((), help="Modules to adapt; all linear layers if not given.")
    dora: bool = option(False, help="Weight-decomposed LoRA (Liu et al. 2024).")
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    pissa: bool = option(False, help="Start from the principal components (Meng et al. 2024).")
    loraplus_ratio: float = option(
        1.0, help="Learning rate of B over that of A (LoRA+, Hayou et al. 2024).", min=0
    )
    quantization: str | None = option(
        None,
        help="4-bit storage of the frozen base; nf4-double for qlora.",
        choices=("nf4", "nf4-double", "fp4", "fp4-double"),
    )
    reduction_factor: float = option(16, help="Hidden size over bottleneck size.", min=1)
    virtual_tokens: int = option(20, help="Tokens of prefix, prompt, p-tuning, llama-adapter.", min=1)
    init_text: str | None = option(
        None, help="Text that initialises prefix and prompt; the first records if not given."
    )
    adapter_layers: int | None = option(None, help="Top layers that llama-adapter changes; all.", min=1)
    peft_option: tuple[str, ...] = option((), help="A field of the PEFT config.", metavar="KEY=VALUE")
    schedule: str = option(
        "cosine", help="Learning rate over time.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.05, help="Share of the steps in which the rate rises.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations: less memory, more time.")
    eval_every: int = option(0, help="Steps between held-out losses; 0 for start and end only.", min=0)
    patience: int = option(
        0, help="Stop after this many held-out losses without a new best, and keep the best; 0 never.", min=0
    )
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )
    show_labels: int = option(
        0, help="Print this many examples with what is learnt marked, and stop.", min=0, role="view"
    )
