"""A Transformers model as a GGUF file: configuration, tokenizer, weights under llama.cpp's names.

Weights go through memory one at a time. What llama.cpp expects otherwise than Transformers stores it: queries
and keys of Llama with the halves of each head interleaved (``permute``), Gemma's norms with their 1 added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.errors import ToolError
from tuneutils.shared.weights import Weights, check_finite
from tuneutils.tools.edge_export.gguf_vocab import add_tokenizer


@dataclass(frozen=True)
class Architecture:
    """How a class of Transformers is called and stored in llama.cpp.

    Attributes:
        name: member of ``gguf.MODEL_ARCH``.
        activation: the only one that llama.cpp computes for it.
        permute: queries and keys are interleaved by head.
        norm_plus_one: norms are stored less 1.
    """

    name: str
    activation: str
    permute: bool = False
    norm_plus_one: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("LLAMA", "silu", permute=True),
    "MistralForCausalLM": Architecture("LLAMA", "silu", permute=True),
    "Qwen2ForCausalLM": Architecture("QWEN2", "silu"),
    "Qwen3ForCausalLM": Architecture("QWEN3", "silu"),
    "GemmaForCausalLM": Architecture("GEMMA", "gelu_pytorch_tanh", norm_plus_one=True),
    "Gemma2ForCausalLM": Architecture("GEMMA2", "gelu_pytorch_tanh", norm_plus_one=True),
    "Gemma3ForCausalLM": Architecture("GEMMA3", "gelu_pytorch_tanh", norm_plus_one=True),
}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def stored_type(weights: Weights) -> str:
    """The plain type that holds all stored matrices exactly."""
    found = {dtype for dtype, shape in weights.specs().values() if len(shape) > 1}
    return STORED[found.pop()] if len(found) == 1 and found <= set(STORED) else "f32"


def write_gguf(weights: Weights, tokenizer: Any, target: Path, precision: str) -> None:
    """Write a model in a plain precision; vectors stay float32, as llama.cpp wants them.

    Args:
        precision: ``f32``, ``f16`` or ``bf16``.

    Raises:
        ToolError: an architecture, activation, position scaling or tokenizer that llama.cpp's reader here is
            not known to compute alike, or a weight that is missing or not finite.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(weights.folder)
    architecture = _architecture(weights, config)
    kind = gguf.MODEL_ARCH[architecture.name]
    writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[kind])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_parameters(writer, config, architecture, weights.given)
    add_tokenizer(writer, tokenizer, config, weights)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    plan = _plan(weights, config, names)
    extra = _rope_factors(config)
    for name, shape in plan.values():
        _announce(writer, gguf, name, shape, precision)
    if extra is not None:
        _announce(writer, gguf, "rope_freqs.weight", tuple(extra.shape), precision)
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key in plan:
        tensor = weights.read(key)[key]
        check_finite(weights.given, key, tensor)
        made = _transformed(tensor, key, config, architecture)
        writer.write_tensor_data(_as_numpy(made, "f32" if made.ndim == 1 else precision))
    if extra is not None:
        writer.write_tensor_data(_as_numpy(extra, "f32"))
    writer.close()


def _architecture(weights: Weights, config: Any) -> Architecture:
    name = (config.architectures or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ToolError(f"{weights.given}: {name} is not among {', '.join(ARCHITECTURES)}")
    found = ARCHITECTURES[name]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wanted = {"silu", "swish"} if found.activation == "silu" else {found.activation, "gelu"}
    if activation not in wanted:
        raise ToolError(
            f"{weights.given}: its activation is {activation}; llama.cpp has {found.activation} for {name}"
        )
    return found


def _plan(weights: Weights, config: Any, names: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Key in the files → llama.cpp's name and shape, by number of layer, then as the model orders them."""
    skeleton = weights.skeleton()
    weights.check_names(skeleton)
    tied = set(getattr(skeleton, "all_tied_weights_keys", {}) or {})
    specs = weights.specs()
    plan = {}
    for parameter, _ in skeleton.named_parameters(remove_duplicate=False):
        key = weights.key(parameter)
        if parameter in tied or key not in specs:
            continue
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ToolError(f"{weights.given}: {parameter} has no place in llama.cpp's {config.model_type}")
        plan[key] = (name, specs[key][1])
    return plan


def _announce(writer: Any, gguf: Any, name: str, shape: tuple[int, ...], precision: str) -> None:
    import numpy as np

    kind = "f32" if len(shape) == 1 else precision
    size = {"f32": 4, "f16": 2, "bf16": 2}[kind]
    raw = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size * math.prod(shape), raw_dtype=raw)


def _transformed(tensor: Tensor, key: str, config: Any, architecture: Architecture) -> Tensor:
    if architecture.permute and ".self_attn.q_proj." in key:
        return permute(tensor, config.num_attention_heads)
    if architecture.permute and ".self_attn.k_proj." in key:
        return permute(tensor, config.num_key_value_heads)
    if architecture.norm_plus_one and key.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def permute(weight: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows: rotary pairs (i, i + d/2) become (2i, 2i + 1)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _as_numpy(tensor: Tensor, precision: str) -> Any:
    made = tensor.to(TORCH[precision]).contiguous()
    return made.view(torch.uint8).numpy() if precision == "bf16" else made.numpy()


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of full attention."""
    given = dict(getattr(config, "rope_parameters", None) or {})
    return dict(given.get("full_attention", given))


def _add_parameters(writer: Any, config: Any, architecture: Architecture, given: str) -> None:
    rope = _rope(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    _add_rope_scaling(writer, rope, given)
    _add_windows(writer, config, architecture, given)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if getattr(config, name, None):
            add(float(getattr(config, name)))


def _add_rope_scaling(writer: Any, rope: dict[str, Any], given: str) -> None:
    import gguf

    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(float(rope["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "llama3"):
        raise ToolError(f"{given}: position scaling {kind!r} is not among default, linear, yarn, llama3")


def _add_windows(writer: Any, config: Any, architecture: Architecture, given: str) -> None:
    """Sliding attention: Gemma 2 and 3 have llama.cpp's own layer pattern, the others must not have any."""
    types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    if architecture.name in ("GEMMA2", "GEMMA3"):
        period = 2 if architecture.name == "GEMMA2" else 6
        wanted = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
        if list(types) != wanted:
            raise ToolError(
                f"{given}: llama.cpp makes every layer but each {period}th slide in {config.model_type}; "
                "this model's layers differ"
            )
        writer.add_sliding_window(int(window))
        local = (config.rope_parameters or {}).get("sliding_attention", {}).get("rope_theta")
        if local is not None:
            writer.add_rope_freq_base_swa(float(local))
    elif "sliding_attention" in types or (not types and window and window < config.max_position_embeddings):
        raise ToolError(f"{given}: sliding attention in {config.model_type} is not computed by llama.cpp")


def _rope_factors(config: Any) -> Tensor | None:
    """Llama 3's division of low frequencies, one factor for each pair of a head (Llama 3.1 model code)."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    context = float(rope["original_max_position_embeddings"])
    smooth = (context / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = torch.where(wavelength < context / high, torch.ones_like(between), between)
    return torch.where(wavelength > context / low, torch.full_like(between, factor), factors)


@dataclass(frozen=True)
class TensorTypes:
    """What a weights file really holds.

    Attributes:
        types: name of the type → its tensors, parameters and bytes, block scales included.
        read_bytes: what one decoded token reads: all but an embedding that is no head as well.
    """

    types: dict[str, dict[str, int]]
    read_bytes: int


def tensor_types(found: Iterable[tuple[str, int, int]], looked_up: int = 0) -> TensorTypes:
    """Sum up ``(type, parameters, bytes)`` of each tensor.

    Args:
        looked_up: bytes of an embedding of which a token reads one row.
    """
    types: dict[str, dict[str, int]] = {}
    for name, parameters, size in found:
        row = types.setdefault(name, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += parameters
        row["bytes"] += size
    size = sum(r["bytes"] for r in types.values())
    return TensorTypes(dict(sorted(types.items())), size - looked_up)


def gguf_tensor_types(path: Path) -> TensorTypes:
    """The types of a GGUF file's tensors."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    names = {t.name: int(t.n_bytes) for t in tensors}
    looked_up = names["token_embd.weight"] if "output.weight" in names else 0
    return tensor_types(((t.tensor_type.name, int(t.n_elements), int(t.n_bytes)) for t in tensors), looked_up)
