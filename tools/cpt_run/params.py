"""The parameters of ``cpt-run``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.shared.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the result of continual pre-training (and, where noted, only how it is run)."""

    model: str = option(help="The model to go on with: artifact, folder, GGUF or Hub id.", short="-m")
    eval: str | None = option(None, help="Held-out text of the domain; its perplexity is tracked.")
    general: str | None = option(None, help="General text; its perplexity shows what is forgotten.")
    replay: tuple[str, ...] = option((), help="General text to learn again beside the domain.")
    replay_share: float = option(
        0.25, help="Share of the learnt tokens that comes from --replay.", min=0, max=0.99
    )
    epochs: float = option(1.0, help="Passes over the domain's text.", min=0)
    tokens: int | None = option(None, help="Learn this many tokens instead, replay included.", min=1)
    budget: str | None = option(
        None, help="Learn as much as fits into this time instead: 30m, 90s, 1h30m.", metavar="TIME"
    )
    method: str = option(
        "full", help=f"{', '.join(METHODS)}, or any PEFT method by its name.", metavar="NAME"
    )
    embeddings: str = option(
        "auto",
        help="Token embeddings and output head: train, freeze, or as the method does.",
        choices=("auto", "train", "freeze"),
    )
    learning_rate: float | None = option(None, help="Peak learning rate; by method if not given.", min=0)
    schedule: str = option(
        "cosine",
        help="How the rate falls after it was warmed up again.",
        choices=("cosine", "linear", "constant"),
    )
    warmup: float = option(0.05, help="Share of the steps in which the rate rises.", min=0, max=1)
    final_rate: float = option(0.1, help="The rate at the end as a share of the peak.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    batch_size: int = option(4, help="Rows of a micro-batch in each process.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(512, help="Tokens of a row; longer documents are split.", min=2)
    pack: bool = option(True, help="Put several documents into a row, hidden from each other.")
    template: str = option(
        "none",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    lora_rank: int = option(16, help="Rank of LoRA's and its kin's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    lora_dropout: float = option(0.0, help="Dropout on LoRA's input.", min=0, max=1)
    target_modules: tuple[str, ...] = option((), help="Modules to adapt; all linear layers if not given.")
    dora: bool = option(False, help="Weight-decomposed LoRA (Liu et al. 2024).")
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    quantization: str | None = option(
        None,
        help="4-bit storage of the frozen base; nf4-double for qlora.",
        choices=("nf4", "nf4-double", "fp4", "fp4-double"),
    )
    reduction_factor: float = option(16, help="Hidden size over bottleneck size.", min=1)
    peft_option: tuple[str, ...] = option((), help="A field of the PEFT config.", metavar="KEY=VALUE")
    gradient_checkpointing: bool = option(False, help="Recompute activations: less memory, more time.")
    eval_every: int = option(0, help="Steps between measurements; 0 for start and end only.", min=0)
    eval_limit: int = option(0, help="Measure on the first so many documents of each; 0 for all.", min=0)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
    max_forgetting: str | None = option(
        None,
        help="Fail (exit 1) if perplexity on --general rises by more than this.",
        metavar="PERCENT",
        role="runtime",
    )
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What the shared methods ask for and continual pre-training has no use for.
    pissa = False
    loraplus_ratio = 1.0
    virtual_tokens = 20
    adapter_layers = None
