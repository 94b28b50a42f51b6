"""Configuration of bottleneck adapters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from peft import PeftConfig
from transformers.activations import ACT2FN

from tuneutils.shared.errors import nearest

from ..registry import AdapterError, extend_peft_type

# The published non-linearity and scaling of each style.
STYLE_DEFAULTS: dict[str, tuple[str, float]] = {
    "houlsby": ("swish", 1.0),
    "pfeiffer": ("relu", 1.0),
    "parallel": ("relu", 4.0),
}
INIT_WEIGHTS = ("zero-up", "bert", "houlsby", "mam_adapter")


@dataclass
class BottleneckConfig(PeftConfig):
    """Configuration of a [`BottleneckModel`].

    An adapter is ``A(x) = scaling * (f(x @ down.T + b_down) @ up.T + b_up)`` with ``down`` of shape
    (size, hidden) and ``up`` of shape (hidden, size). The style says where it goes; with ``x`` the stream:

    - ``houlsby`` (Houlsby et al. 2019, section 2.1): after the attention and after the MLP, each before the
      residual addition: ``x + s + A(s)``, ``s`` being the sublayer's output.
    - ``pfeiffer`` (Pfeiffer et al. 2021, AdapterFusion; MAD-X): after the MLP only. In post-norm models
      ``LayerNorm(z + A(LayerNorm(z)))`` with ``z = x + mlp(x)``. Pre-norm models have no norm there, and
      follow the `adapters` library (``original_ln_before`` without a norm): the layer's output ``h`` becomes
      ``h + A(h)``.
    - ``parallel`` (He et al. 2022, scaled parallel adapter at the FFN): ``mlp(u) + A(u)``, ``u`` being the
      MLP's input. In pre-norm models that is the normalised stream; the `adapters` library reads it before
      the norm there. The paper does not settle it, and its authors' code has both (``hi_lnbefore``).

    Args:
        style: ``houlsby``, ``pfeiffer`` or ``parallel``.
        reduction_factor: bottleneck size is ``max(1, hidden_size // reduction_factor)``.
        bottleneck_size: the size itself; overrides ``reduction_factor``.
        non_linearity: an activation name of transformers. None: swish for houlsby, relu for the others.
        scaling: a factor, or ``"learned"`` (one scalar an adapter module, from 1). None: 4 for
            parallel, else 1.
        dropout: probability, on the adapter's output.
        init_weights: ``zero-up`` (down normal, std 0.02, up zero: the model starts equal to its base),
            ``bert`` (both normal, std 0.02), ``houlsby`` (both normal, std 0.01, cut at two std: Houlsby et
            al., section 3.6), ``mam_adapter`` (down Kaiming-uniform, up zero: He et al.). Biases are zero.
        invertible: also adapt the embeddings by an invertible adapter, undone before the output embedding
            (MAD-X, Pfeiffer et al. 2020, section 2.2.2); for language adapters.
        invertible_size: width inside it. None: a quarter of the embedding's (as published).
        hidden_size: width of the adapted modules' output. None: the model's own ``hidden_size``.
        target_modules: names or a regular expression of the modules to wrap. None: by architecture.
        exclude_modules: names or a regular expression of modules to leave.
        layers_to_transform: index or indices of the layers to adapt. None: all.
        modules_to_save: further modules to train and save.

    Raises:
        AdapterError: a value outside what is listed here.
    """

    style: str = field(default="houlsby", metadata={"help": "houlsby, pfeiffer or parallel."})
    reduction_factor: float = field(default=16, metadata={"help": "Hidden size divided by bottleneck size."})
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Bottleneck size; overrides reduction_factor."}
    )
    non_linearity: str | None = field(
        default=None, metadata={"help": "Activation; None is the style's published one."}
    )
    scaling: float | str | None = field(
        default=None, metadata={"help": "Factor on the adapter's output, or 'learned'."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the adapter's output."})
    init_weights: str = field(default="zero-up", metadata={"help": "zero-up, bert, houlsby or mam_adapter."})
    invertible: bool = field(
        default=False, metadata={"help": "Also adapt the embeddings, invertibly (MAD-X)."}
    )
    invertible_size: int | None = field(
        default=None, metadata={"help": "Width inside the invertible adapter; None: a quarter."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the adapted modules' output; None: the model's."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to wrap: names or a regex; None: by architecture."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave: names or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; None: all."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("BOTTLENECK")
        _check_choice("style", self.style, STYLE_DEFAULTS)
        _check_choice("init_weights", self.init_weights, INIT_WEIGHTS)
        default_non_linearity, default_scaling = STYLE_DEFAULTS[self.style]
        if self.non_linearity is None:
            self.non_linearity = default_non_linearity
        if self.scaling is None:
            self.scaling = default_scaling
        _check_choice("non_linearity", self.non_linearity, ACT2FN)
        if isinstance(self.scaling, str) and self.scaling != "learned":
            raise AdapterError(f"scaling is {self.scaling!r}; give a number or 'learned'")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout}; give a probability in [0, 1)")
        if self.reduction_factor <= 0:
            raise AdapterError(f"reduction_factor is {self.reduction_factor}; give one above 0")
        if self.bottleneck_size is not None and self.bottleneck_size < 1:
            raise AdapterError(f"bottleneck_size is {self.bottleneck_size}; give 1 or more")
        if self.invertible_size is not None and self.invertible_size < 1:
            raise AdapterError(f"invertible_size is {self.invertible_size}; give 1 or more")
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]

    def size(self, hidden_size: int) -> int:
        """Bottleneck size for modules of the given width."""
        return self.bottleneck_size or max(1, int(hidden_size // self.reduction_factor))


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        hint = nearest(value, known)
        raise AdapterError(f"{name} is {value!r}; give one of {', '.join(sorted(known))}{hint}")
