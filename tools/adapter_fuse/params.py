"""The parameters of ``adapter-fuse``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """What decides a fusion (and, where noted, only how it is trained)."""

    model: str = option(help="The base of the adapters: artifact, folder, GGUF or Hub id.", short="-m")
    adapter: tuple[str, ...] = option((), help="An adapter to fuse; give two or more.", metavar="ADAPTER")
    kind: str = option(
        "attention",
        help="AdapterFusion's attention at each layer, or a cheap gate.",
        choices=("attention", "gate"),
    )
    attention_size: int | None = option(
        None,
        help="Width of query and key; the layer's own for bottlenecks (as published), 16 for LoRAs.",
        min=1,
    )
    normalize_query: bool = option(
        True, help="Divide what the query reads by its root mean square; for pre-norm models."
    )
    value_penalty: float = option(
        0.01, help="Weight of the squared distance of the value matrices from the identity.", min=0
    )
    heldout: str | None = option(None, help="Records on which the held-out loss is measured.")
    learning_rate: float | None = option(None, help="Peak learning rate; by kind if not given.", min=0)
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

    @property
    def method(self) -> str:
        """What is trained, as the tools that tune a model call it."""
        return f"fusion-{self.kind}"


@dataclass(frozen=True, kw_only=True)
class StackParams:
    """What a stack is made of: its arguments."""


@dataclass(frozen=True, kw_only=True)
class ReportParams:
    """What a report measures."""

    model: str = option(help="A fusion, made by adapter-fuse train.", short="-m", metavar="FUSION")
    against: tuple[str, ...] = option(
        (), help="Another model or adapter to compare with, such as a merged one.", metavar="MODEL"
    )
    domain_field: str = option(
        "domain", help="The field of a record that names its domain; the file's name where it is absent."
    )
    max_length: int = option(512, help="Longest example, in tokens.", min=2)
    too_long: str = option(
        "error",
        help="A longer example is a bad record, is cut at the end, or dropped; plain text is always split.",
        choices=("error", "truncate", "drop"),
    )
    learn: str = option("completion", help="Which tokens are scored.", choices=("completion", "last", "all"))
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
