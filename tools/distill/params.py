"""The parameters of ``distill``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

LOSSES = ("forward-kl", "reverse-kl", "jsd", "uld", "ce")


@dataclass(frozen=True, kw_only=True)
class Params:
    """What decides the student (and, where noted, only how the run goes)."""

    model: str = option(help="The teacher: artifact, folder, GGUF, adapter or Hub id.", short="-m")
    student: str | None = option(
        None, help="A student that is there already; else one is cut from the teacher."
    )
    student_layers: int | None = option(None, help="Layers of the student.", min=1)
    layer_importance: str = option(
        "uniform",
        help="Which layers stay: evenly spaced, or those that change their input most (ShortGPT).",
        choices=("uniform", "block-influence"),
    )
    keep_layers: str | None = option(None, help="The layers that stay, such as 0-3,8,29.", metavar="LIST")
    student_hidden_size: int | None = option(None, help="Width of the student.", min=1)
    student_intermediate_size: int | None = option(None, help="Width of its feed-forward blocks.", min=1)
    student_kv_heads: int | None = option(
        None, help="Its key and value heads; the query heads of each stay with it.", min=1
    )
    calibration_rows: int = option(32, help="Examples that importance is measured on.", min=1)
    loss: str = option(
        "forward-kl",
        help="What is learnt from the teacher's distributions; uld takes another tokenizer, ce no teacher.",
        choices=LOSSES,
    )
    beta: float = option(0.5, help="jsd's weight of the teacher in the mixture.", min=0, max=1)
    temperature: float = option(1.0, help="Softens both distributions; the loss is times its square.", min=0)
    ce_weight: float = option(0.0, help="Weight of the labels' cross-entropy beside the divergence.", min=0)
    hidden_weight: float = option(0.0, help="Weight of matching hidden states, layer by layer.", min=0)
    attention_weight: float = option(0.0, help="Weight of matching attention, layer by layer.", min=0)
    top_k: int = option(
        0, help="Keep the teacher's K likeliest tokens and the rest's mass on disk; 0 asks it anew.", min=0
    )
    data: str = option(
        "records",
        help="What is learnt from: the records, the teacher's answers to them, or the student's own (GKD).",
        choices=("records", "teacher", "student"),
    )
    student_fraction: float = option(
        1.0, help="With --data student: share of the steps on its own answers.", min=0, max=1
    )
    prompt_tokens: int = option(16, help="Of a plain text, the tokens that count as its prompt.", min=1)
    max_new_tokens: int = option(64, help="Longest answer that teacher or student writes.", min=1)
    sampling_temperature: float = option(1.0, help="Of those answers; 0 is greedy.", min=0)
    heldout: str | None = option(None, help="Records that the report is made on.")
    capability: tuple[str, ...] = option(
        (),
        help="Report also on a set of records, or on the held-out ones whose field fits a pattern.",
        metavar="NAME=FILE|NAME=FIELD~REGEX",
    )
    baseline: str | None = option(
        None, help="A model to compare with in the report: the same student trained with --loss ce."
    )
    learning_rate: float = option(5e-4, help="Peak learning rate.", min=0)
    epochs: float = option(1.0, help="Passes over the records.", min=0)
    max_steps: int | None = option(None, help="Stop after this many optimizer steps instead.", min=1)
    batch_size: int = option(8, help="Examples of a micro-batch.", min=1)
    gradient_accumulation: int = option(1, help="Micro-batches of one optimizer step.", min=1)
    max_length: int = option(256, help="Longest example, in tokens; longer text is split.", min=4)
    learn: str = option("completion", help="Which tokens are learnt.", choices=("completion", "last", "all"))
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    freeze_embeddings: bool = option(False, help="Keep the student's embeddings as they are.")
    keep_zeros: bool = option(
        False, help="Weights that are zero stay so: a pruned student keeps its pattern."
    )
    schedule: str = option(
        "cosine", help="Learning rate over time.", choices=("cosine", "linear", "constant")
    )
    warmup: float = option(0.05, help="Share of the steps in which the rate rises.", min=0, max=1)
    weight_decay: float = option(0.0, help="AdamW's weight decay.", min=0)
    max_grad_norm: float = option(1.0, help="Clip the gradient's norm to this; 0 for never.", min=0)
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")
    cache: str | None = option(
        None, help="Folder of cached teacher logits; .work beside the output.", role="runtime"
    )
    speed: bool = option(True, help="Time the student beside its teacher, into the run log.", role="runtime")
    checkpoint_every: int = option(
        200, help="Steps between resumable checkpoints; 0 for none.", min=0, role="runtime"
    )

    # What training can do and this tool does without.
    gradient_checkpointing = False
