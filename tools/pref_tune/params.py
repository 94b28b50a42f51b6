"""The parameters of ``pref-tune``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option
from tuneutils.shared.methods import METHODS

LOSSES = ("dpo", "cdpo", "robust", "ipo", "dpo-norm", "simpo", "kto", "orpo")
TEMPLATES = ("auto", "chat", "none")


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """What decides an aligned model (and, where noted, only how the run is done)."""

    model: str = option(help="The model to align, which is the reference too.", short="-m")
    loss: str = option(
        "dpo",
        help="dpo; cdpo, robust: for noisy labels; ipo; dpo-norm, simpo: per token; kto: single answers "
        "labelled good or bad; orpo: with the likelihood of what is chosen.",
        choices=LOSSES,
    )
    beta: float | None = option(
        None, help="β, the weight of staying near the reference; IPO's τ, ORPO's λ; by loss.", min=1e-6
    )
    label_smoothing: float = option(
        0.1, help="Share of labels that cdpo and robust take to be flipped.", min=0, max=0.499
    )
    gamma: float = option(1.0, help="SimPO's target margin of the reward.", min=0)
    soft_labels: bool = option(
        True, help="Learn the share of votes (strength, or votes) rather than the majority."
    )
    margin_scale: float = option(
        0.0,
        help="Factor of the field margin, by which the reward of chosen must be ahead (ODPO); 0 ignores it.",
        min=0,
    )
    desirable_weight: float = option(1.0, help="KTO's weight of good answers.", min=0)
    undesirable_weight: float = option(1.0, help="KTO's weight of bad answers.", min=0)
    heldout: str | None = option(
        None, help="Records to evaluate on; by default --heldout-share of the prompts."
    )
    heldout_share: float = option(
        0.1, help="Share of the prompts that is held out when there is no --heldout.", min=0, max=0.9
    )
    reward_model: str | None = option(
        None, help="An rm-train artifact that judges sampled answers against the reference's.", short="-r"
    )
    general: str | None = option(None, help="General text; its perplexity shows what was forgotten.")
    answers: int = option(
        32, help="Held-out prompts answered by both models, for KL and win rate; 0 for none.", min=0
    )
    max_new_tokens: int = option(64, help="Tokens of such an answer, EOS included.", min=1)
    temperature: float = option(1.0, help="Of these answers, and of the log-probabilities in KL.", min=1e-3)
    method: str = option(
        "lora", help=f"{', '.join(METHODS)}, or any PEFT method by its name.", metavar="NAME"
    )
    learning_rate: float | None = option(
        None, help="Peak learning rate; 1e-6 for full, 5e-5 for lora and qlora, else the method's own.", min=0
    )
    epochs: float = option(1.0, help="Passes over the records.", min=0)
    max_steps: int | None = option(None, help="Stop after this many optimizer steps instead.", min=1)
    batch_size: int = option(8, help="Pairs, or KTO's answers, of a micro-batch in each process.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(1024, help="Longest prompt with completion, in tokens.", min=2)
    too_long: str = option(
        "error",
        help="A longer text makes a bad record, loses the start of its prompt, or is dropped.",
        choices=("error", "truncate", "drop"),
    )
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=TEMPLATES,
    )
    lora_rank: int = option(16, help="Rank of LoRA's and its kin's update.", min=1)
    lora_alpha: int | None = option(None, help="LoRA's scale numerator; twice the rank if not given.")
    target_modules: tuple[str, ...] = option((), help="Modules to adapt; all linear layers if not given.")
    dora: bool = option(False, help="Weight-decomposed LoRA (Liu et al. 2024).")
    rslora: bool = option(False, help="Scale by alpha/sqrt(rank) (Kalajdzievski 2023).")
    quantization: str | None = option(
        None,
        help="4-bit storage of the frozen base; nf4-double for qlora.",
        choices=("nf4", "nf4-double", "fp4", "fp4-double"),
    )
    reduction_factor: float = option(16, help="Hidden size over bottleneck size.", min=1)
    virtual_tokens: int = option(20, help="Tokens of prefix, prompt, p-tuning, llama-adapter.", min=1)
    adapter_layers: int | None = option(None, help="Top layers that llama-adapter changes; all.", min=1)
    peft_option: tuple[str, ...] = option((), help="A field of the PEFT config.", metavar="KEY=VALUE")
    schedule: str = option(
        "linear", help="Learning rate over time.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.1, help="Share of the steps in which the rate rises.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    gradient_checkpointing: bool = option(False, help="Recompute activations: less memory, more time.")
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What the methods can do and alignment does without: dropout off (policy and reference must be one
    # network at the start), and no update that changes the base under the adapter.
    lora_dropout = 0.0
    pissa = False
    loraplus_ratio = 1.0


@dataclass(frozen=True, kw_only=True)
class ConstitutionParams:
    """What decides the pairs that a constitution makes."""

    model: str = option(help="The model that drafts, critiques and revises.", short="-m")
    principles: str = option(
        "builtin:example", help="A YAML file of principles; builtin:example is the one that is shipped."
    )
    rounds: int = option(1, help="Critiques and revisions, each by a principle of its own.", min=1)
    reward_model: str | None = option(
        None, help="An rm-train artifact; a pair whose revision scores no better is dropped.", short="-r"
    )
    unfinished: str = option(
        "drop",
        help="A draft or revision cut off at --max-new-tokens: drop or keep.",
        choices=("drop", "keep"),
    )
    max_new_tokens: int = option(256, help="Tokens of a draft, critique or revision, EOS included.", min=1)
    temperature: float = option(0.7, help="Of sampling; 0 is greedy.", min=0)
    top_p: float = option(1.0, help="Sample from the likeliest tokens of this probability.", min=0.01, max=1)
    limit: int | None = option(None, help="Only the first prompts.", min=1)
    dropped: str | None = option(
        None, help="Keep dropped pairs here, with the reason in why.", role="runtime"
    )
    batch_size: int = option(16, help="Prompts generated at once.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
