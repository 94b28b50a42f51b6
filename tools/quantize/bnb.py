"""bitsandbytes' formats, by its own functions: what its modules would save, without building the model."""

from __future__ import annotations

from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor

from tuneutils.shared.device import dtype_name
from tuneutils.shared.four_bit import BNB_SCHEMES


def four_bit(module: str, weight: Tensor, scheme: str) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors stored for a module and the weights that they stand for.

    Args:
        weight: ``(rows, columns)`` in the precision that the model is to be used in.
        scheme: a key of ``BNB_SCHEMES``.
    """
    from bitsandbytes import functional

    kind, double = BNB_SCHEMES[scheme]
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=double, quant_type=kind
    )
    tensors = {f"{module}.weight": packed}
    for name, value in state.as_dict(packed=True).items():
        tensors[f"{module}.weight.{name}"] = value
    return tensors, functional.dequantize_4bit(packed, state).float()


def eight_bit(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): int8 by row; outlier inputs are split off later."""
    from bitsandbytes import functional

    codes, row_max, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    tensors = {
        f"{module}.weight": codes,
        f"{module}.SCB": row_max,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, codes.float() * (row_max.float() / 127)[:, None]


def config(scheme: str, kept: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``; ``kept`` are modules in full precision."""
    made: dict[str, Any] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": scheme != "llm-int8",
        "load_in_8bit": scheme == "llm-int8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
    }
    if scheme != "llm-int8":
        kind, double = BNB_SCHEMES[scheme]
        made |= {
            "bnb_4bit_compute_dtype": dtype_name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
        }
    return made
