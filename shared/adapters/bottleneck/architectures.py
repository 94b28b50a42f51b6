"""Which modules each style wraps, by architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """Module names within one transformer layer; the empty name is the layer itself.

    Args:
        layers: name of the list of layers.
        houlsby: modules whose output is the last thing before a residual addition.
        pfeiffer: the module whose output is the layer's, or the layer's last LayerNorm in post-norm models.
        parallel: the MLP; in post-norm models, the module that adds the MLP's input to its output. None where
            the MLP is not a module.
        final_norm: the last module before the output embedding, beside the list of layers. None where other
            modules come between them.
    """

    layers: str
    houlsby: tuple[str, ...]
    pfeiffer: str = ""
    parallel: str | None = "mlp"
    final_norm: str | None = "norm"

    def pattern(self, style: str) -> str | None:
        """Regular expression of the full names of the modules that ``style`` wraps, no vision tower's."""
        names = getattr(self, style)
        if names is None:
            return None
        names = (names,) if isinstance(names, str) else names
        tail = "|".join(re.escape(f".{name}" if name else "") for name in names)
        return rf"(?!.*vision)(?:.*\.)?{self.layers}\.\d+(?:{tail})"


_PRE_NORM = Architecture("layers", houlsby=("self_attn", "mlp"))
# A norm on each sublayer's output: the adapter comes after it, right before the residual addition.
_SANDWICH_NORM = Architecture("layers", houlsby=("post_attention_layernorm", "post_feedforward_layernorm"))
# Houlsby et al. put the adapter after the dropout; the modules that hold the dropout also hold the norm.
_BERT = Architecture(
    "layer",
    houlsby=("attention.output.dropout", "output.dropout"),
    pfeiffer="output.LayerNorm",
    parallel="output",
    final_norm=None,
)
_OPT = Architecture("layers", houlsby=("self_attn", "fc2"), parallel=None, final_norm="final_layer_norm")
_OPT_POST_NORM = Architecture(
    "layers", houlsby=("self_attn", "fc2"), pfeiffer="final_layer_norm", parallel=None, final_norm=None
)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "smollm3", "starcoder2"), _PRE_NORM
    ),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "olmo2"), _SANDWICH_NORM),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "gpt2": Architecture("h", houlsby=("attn", "mlp"), final_norm="ln_f"),
    "gpt_neox": Architecture("layers", houlsby=("attention", "mlp"), final_norm="final_layer_norm"),
    "opt": _OPT,
}


def find_architecture(model_config: dict[str, Any]) -> Architecture | None:
    """The architecture of a model's config in dictionary form, or None where it is not known."""
    model_type = model_config.get("model_type")
    if model_type == "opt" and not model_config.get("do_layer_norm_before", True):
        return _OPT_POST_NORM
    return ARCHITECTURES.get(str(model_type))
