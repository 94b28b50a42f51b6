"""Configuration of composed adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from tuneutils.shared.errors import nearest

from ..registry import AdapterError, extend_peft_type

KINDS = ("attention", "gate", "stack")
#: Fields of an adapter's own configuration that say what its modules are.
KEPT = {
    "BOTTLENECK": (
        "style", "bottleneck_size", "reduction_factor", "non_linearity", "scaling", "hidden_size",
        "invertible", "invertible_size",
    ),
    "LORA": ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
}  # fmt: skip
#: Width of query, key and value projections over LoRAs, which sit at every linear layer.
LORA_ATTENTION_SIZE = 16


@dataclass
class FusionConfig(PeftConfig):
    """Configuration of a [`FusionModel`]: several trained adapters of one kind, and how they act together.

    At each place where the adapters sit, with ``z_n`` what the n-th adds to the stream there:

    - ``attention`` (AdapterFusion, Pfeiffer et al. 2021, section 3.2): ``s = softmax_n((Q h)ᵀ (K z_n))`` and
      ``Σ_n s_n V z_n`` is added, ``h`` being the frozen module's own output. Q and K start random, V as the
      identity.
    - ``gate``: ``s = softmax(W h + b)``, and ``Σ_n s_n z_n`` is added; W and b start at zero, the average.
    - ``stack`` (MAD-X, Pfeiffer et al. 2020, section 2.2): each adapter reads what the one before it wrote;
      the last is trained, those below are frozen.

    Args:
        kind: ``attention``, ``gate`` or ``stack``.
        adapters: for each adapter ``{"name": …, "peft_type": …, "config": {…}}``, in order.
        attention_size: width of the projections Q and K; V is then the identity plus a product of that rank.
            None: full width (as published) for bottlenecks, 16 for LoRAs.
        normalize_query: read ``h / rms(h)`` in place of h, so that the softmax of a pre-norm model, whose
            stream grows with depth, does not start saturated. False: h as it is.
        target_modules: a regular expression of the modules where the adapters sit.

    Raises:
        AdapterError: no adapters, adapters of several kinds, or a value outside what is listed here.
    """

    kind: str = field(default="attention", metadata={"help": "attention, gate or stack."})
    adapters: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "Name, PEFT type and configuration of each adapter."}
    )
    attention_size: int | None = field(default=None, metadata={"help": "Width of query and key."})
    normalize_query: bool = field(
        default=True, metadata={"help": "Divide the query by its root mean square."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "A regular expression of the adapted modules."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Always None."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("FUSION")
        if self.kind not in KINDS:
            raise AdapterError(
                f"kind is {self.kind!r}; give one of {', '.join(KINDS)}{nearest(self.kind, KINDS)}"
            )
        if not self.adapters:
            raise AdapterError("no adapters to compose")
        types = sorted({entry["peft_type"] for entry in self.adapters})
        if len(types) > 1 or types[0] not in KEPT:
            raise AdapterError(f"adapters of {' and '.join(types)}; give only bottlenecks or only LoRAs")
        if self.kind == "stack" and types != ["BOTTLENECK"]:
            raise AdapterError("a stack is made of bottleneck adapters; LoRAs only add up")
        if len(styles := sorted({entry["config"].get("style", "") for entry in self.adapters})) > 1:
            raise AdapterError(f"bottlenecks of styles {' and '.join(styles)}, which sit in different places")
        if self.kind != "stack" and any(entry["config"].get("invertible") for entry in self.adapters):
            raise AdapterError(
                "invertible adapters cannot be fused, as a mix of them has no inverse; stack them"
            )
        if self.attention_size is not None and self.attention_size < 1:
            raise AdapterError(f"attention_size is {self.attention_size}; give 1 or more")

    @property
    def names(self) -> list[str]:
        """The adapters' names, in order."""
        return [entry["name"] for entry in self.adapters]

    @property
    def style(self) -> str:
        """Style of the bottlenecks; ``parallel`` for LoRAs, which act beside a linear layer."""
        return str(self.adapters[0]["config"].get("style", "parallel"))

    def projection_size(self) -> int | None:
        """Width of the attention's projections; None for that of the stream."""
        if self.attention_size is None and self.adapters[0]["peft_type"] == "LORA":
            return LORA_ATTENTION_SIZE
        return self.attention_size
