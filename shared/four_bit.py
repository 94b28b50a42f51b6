"""bitsandbytes' 4-bit weights: how they are asked for, and what its CPU kernels must be kept from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuneutils.shared.errors import ToolError, require

if TYPE_CHECKING:
    import torch

#: 4-bit storage by bitsandbytes: name → (quant type, double quantization).
BNB_SCHEMES = {
    "nf4": ("nf4", False),
    "nf4-double": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-double": ("fp4", True),
}


def bnb_config(scheme: str, compute_dtype: torch.dtype) -> Any:
    """bitsandbytes 4-bit storage (Dettmers et al. 2023, QLoRA, section 3)."""
    require("bitsandbytes", "qlora")
    from transformers import BitsAndBytesConfig

    quant_type, double = BNB_SCHEMES[scheme]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def check_4bit_rows(model: Any, given: str, device: torch.device) -> None:
    """Refuse rows that are no whole number of blocks on a CPU: bitsandbytes 0.50.2 dequantizes them wrongly.

    Raises:
        ToolError: there are such matrices (65).
    """
    if device.type != "cpu":
        return
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        block = module.weight.quant_state.blocksize
        if module.in_features % block:
            raise ToolError(
                f"{given}: {name} is {module.in_features} wide, no multiple of {block}, and bitsandbytes "
                "reads such 4-bit rows wrongly on a CPU; leave it in full precision (lora), or use a GPU"
            )


def keep_4bit_layout(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first eval forward on a CPU.

    The repacked layout has no backward and cannot be saved: training after an evaluation would lose the
    base path's gradient with no more than a warning.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
