"""Fine-tuning methods: from a method's name to a model with just the right parameters trainable.

Importing this module loads no heavy library.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.manifest import write_json

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerBase

#: method → (PEFT type or "", default learning rate, one line on what it is)
METHODS: dict[str, tuple[str, float, str]] = {
    "full": ("", 2e-5, "every weight"),
    "lora": ("LORA", 2e-4, "low-rank updates of all linear layers (Hu et al. 2021)"),
    "qlora": ("LORA", 2e-4, "LoRA over a 4-bit base (Dettmers et al. 2023)"),
    "houlsby": ("BOTTLENECK", 1e-3, "bottlenecks after attention and MLP (Houlsby et al. 2019)"),
    "pfeiffer": ("BOTTLENECK", 1e-3, "a bottleneck after the MLP (Pfeiffer et al. 2021)"),
    "parallel": ("BOTTLENECK", 1e-3, "a bottleneck beside the MLP (He et al. 2022)"),
    "mad-x": (
        "BOTTLENECK",
        1e-3,
        "pfeiffer and an invertible adapter: for languages (Pfeiffer et al. 2020)",
    ),
    "llama-adapter": ("ADAPTION_PROMPT", 5e-3, "gated prompts in attention (Zhang et al. 2023)"),
    "prefix": ("PREFIX_TUNING", 5e-3, "learned keys and values (Li & Liang 2021)"),
    "p-tuning": ("P_TUNING", 1e-3, "a prompt written by a small network (Liu et al. 2021)"),
    "prompt": ("PROMPT_TUNING", 1e-2, "learned input embeddings (Lester et al. 2021)"),
    "ia3": ("IA3", 5e-3, "learned rescaling of keys, values and MLP (Liu et al. 2022)"),
}
OTHER_LEARNING_RATE = 1e-3

#: PEFT methods that a plain causal-language-model loss cannot train → why
UNSUPPORTED = {
    "adalora": "its rank allocation and orthogonality loss need a training loop of their own",
    "multitask-prompt-tuning": "it needs a task id with every record",
    "poly": "it needs a task id with every record",
    "shadow": "it trains a second model beside the first",
    "xlora": "it mixes adapters that are trained already",
}

#: PEFT methods that change other modules than linear layers, and know which.
NOT_LINEAR = ("adaption-prompt", "beft", "ln-tuning", "trainable-tokens")


class MethodParams(Protocol):
    """The parameters of a tool that say how its model is tuned."""

    @property
    def model(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def lora_rank(self) -> int: ...
    @property
    def lora_alpha(self) -> int | None: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def target_modules(self) -> tuple[str, ...]: ...
    @property
    def dora(self) -> bool: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def pissa(self) -> bool: ...
    @property
    def loraplus_ratio(self) -> float: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def reduction_factor(self) -> float: ...
    @property
    def virtual_tokens(self) -> int: ...
    @property
    def adapter_layers(self) -> int | None: ...
    @property
    def peft_option(self) -> tuple[str, ...]: ...
    @property
    def gradient_checkpointing(self) -> bool: ...


def check_method(params: MethodParams) -> None:
    """Refuse an unknown method, and options that the method would ignore.

    Raises:
        ToolError: exit 2, with the nearest name.
    """
    if params.method not in METHODS and _peft_type(params.method) not in _peft_configs():
        known = [*METHODS, *(name.lower().replace("_", "-") for name in _peft_configs())]
        raise ToolError(
            f"--method {params.method}: unknown{nearest(params.method, known)}", code=ExitCode.USAGE
        )
    if params.method in UNSUPPORTED:
        raise ToolError(
            f"--method {params.method}: not supported: {UNSUPPORTED[params.method]}", code=ExitCode.USAGE
        )
    if params.method == "trainable-tokens" and "token_indices" not in peft_options(params):
        raise ToolError(
            "--method trainable-tokens: which tokens? --peft-option 'token_indices=[5, 6]'",
            code=ExitCode.USAGE,
        )
    lora_only = {"dora": params.dora, "rslora": params.rslora, "pissa": params.pissa}
    lora_only["loraplus-ratio"] = params.loraplus_ratio != 1.0
    for name, used in lora_only.items():
        if used and params.method not in ("lora", "qlora"):
            raise ToolError(f"--{name} goes with --method lora or qlora", code=ExitCode.USAGE)
    if params.method == "full" and (params.quantization or params.peft_option):
        raise ToolError("--method full takes no --quantization or --peft-option", code=ExitCode.USAGE)
    if "lm_head" in params.target_modules:
        raise ToolError(
            "--target-modules lm_head: the output head cannot be adapted; "
            "--peft-option 'modules_to_save=[lm_head]' trains a copy of it",
            code=ExitCode.USAGE,
        )
    if params.pissa and quantization(params):
        raise ToolError("--pissa changes the base's weights, which 4-bit storage cannot", code=ExitCode.USAGE)


def quantization(params: MethodParams) -> str | None:
    """The 4-bit scheme of the base, if any."""
    return params.quantization or ("nf4-double" if params.method == "qlora" else None)


def learning_rate(params: MethodParams) -> float:
    """The rate given, or the method's own."""
    if params.learning_rate is not None:
        return params.learning_rate
    return METHODS[params.method][1] if params.method in METHODS else OTHER_LEARNING_RATE


def apply_method(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    params: MethodParams,
    init_text: str,
    under: str | None = None,
) -> Any:
    """The model with its adapter in place; for ``full``, the model with every weight trainable.

    Args:
        init_text: what prefix and prompt start from.
        under: a bottleneck adapter on which a new one is stacked.
    """
    if params.method == "full":
        return model.requires_grad_(True)
    from peft import get_peft_model

    config = peft_config(params, model.config)
    if under is not None:
        return _stacked(model, config, under)
    try:
        made = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, RuntimeError) as exc:
        raise _refused(params, exc) from exc
    options = peft_options(params)
    if params.method == "prefix" and "init_weights" not in options:
        _prefix_from_text(made, tokenizer, init_text, params.virtual_tokens)
    if params.method == "prompt" and "prompt_tuning_init" not in options:
        _prompt_from_text(made, tokenizer, init_text, params.virtual_tokens)
    return made


def _stacked(model: Any, config: Any, under: str) -> Any:
    from tuneutils.shared.adapters.fusion.compose import read_part, stack_on

    return stack_on(model, read_part(under, Path(under).resolve().name), config, "task")


def peft_config(params: MethodParams, model_config: Any) -> PeftConfig:
    """The PEFT config of a method, with ``--peft-option`` on top.

    Raises:
        ToolError: exit 2, an option that the config does not have.
    """
    name = METHODS[params.method][0] if params.method in METHODS else _peft_type(params.method)
    config_class = _peft_configs()[name]
    known = {f.name for f in fields(config_class)}
    values: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    values.update({k: v for k, v in _method_options(params, model_config).items() if k in known})
    for key, value in peft_options(params).items():
        if key not in known:
            raise ToolError(
                f"--peft-option {key}: {config_class.__name__} has no such field{nearest(key, known)}",
                code=ExitCode.USAGE,
            )
        values[key] = value
    try:
        return config_class(**values)
    except (ValueError, TypeError, AttributeError) as exc:
        raise _refused(params, exc) from exc


def _refused(params: MethodParams, exc: Exception) -> ToolError:
    reason = " ".join(str(exc).split())[:300]
    return ToolError(f"--method {params.method}: PEFT refuses: {reason}", code=ExitCode.USAGE)


def peft_options(params: MethodParams) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values read as YAML."""
    import yaml

    made = {}
    for pair in params.peft_option:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ToolError(f"--peft-option {pair}: must be KEY=VALUE", code=ExitCode.USAGE)
        made[key.replace("-", "_")] = yaml.safe_load(value)
    return made


def _peft_type(method: str) -> str:
    return method.upper().replace("-", "_")


def _peft_configs() -> dict[str, type[PeftConfig]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from tuneutils.shared import adapters  # noqa: F401 - registers our tuners with PEFT

    return {getattr(k, "value", str(k)): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _method_options(params: MethodParams, model_config: Any) -> dict[str, Any]:
    """PEFT's fields for our options; those that a config lacks are left out by the caller."""
    targets: Any = list(params.target_modules) or "all-linear"
    alpha = params.lora_alpha if params.lora_alpha is not None else 2 * params.lora_rank
    if params.method in ("lora", "qlora"):
        return {
            "r": params.lora_rank,
            "lora_alpha": alpha,
            "lora_dropout": params.lora_dropout,
            "target_modules": targets,
            "use_dora": params.dora,
            "use_rslora": params.rslora,
            "init_lora_weights": "pissa" if params.pissa else True,
        }
    if params.method in ("houlsby", "pfeiffer", "parallel"):
        bottleneck: dict[str, Any] = {"style": params.method, "reduction_factor": params.reduction_factor}
        return bottleneck | ({"target_modules": targets} if params.target_modules else {})
    if params.method == "mad-x":
        return {"style": "pfeiffer", "reduction_factor": params.reduction_factor, "invertible": True}
    if params.method == "llama-adapter":
        layers = params.adapter_layers or model_config.num_hidden_layers
        return {"adapter_len": params.virtual_tokens, "adapter_layers": layers}
    if params.method in ("prefix", "p-tuning"):
        return {"num_virtual_tokens": params.virtual_tokens, "encoder_hidden_size": model_config.hidden_size}
    if params.method == "prompt":
        return {"num_virtual_tokens": params.virtual_tokens, "prompt_tuning_init": "RANDOM"}
    if params.method == "ia3":
        return {"target_modules": list(params.target_modules)} if params.target_modules else {}
    other: dict[str, Any] = {
        "r": params.lora_rank,
        "alpha": alpha,
        "lora_alpha": alpha,
        "num_virtual_tokens": params.virtual_tokens,
        "adapter_len": params.virtual_tokens,
        "adapter_layers": params.adapter_layers or model_config.num_hidden_layers,
        "target_modules": targets,
    }
    if params.method == "oft":
        del other["r"]  # a number of blocks, which excludes the size of a block that it has by default
    if params.method in NOT_LINEAR and not params.target_modules:
        del other["target_modules"]
    return other


def _prefix_from_text(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> None:
    """Start the prefix from the keys and values that the model itself has for a text.

    PEFT's own comparison finds .42 against .19 accuracy for this over a random start.
    """
    import torch
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    base = model.get_base_model()
    with torch.no_grad():
        cache = base(_repeated(tokenizer, text, length).to(base.device), use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=length)


def _prompt_from_text(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> None:
    """Start the prompt from the embeddings of a text's tokens (Lester et al. 2021, section 3.2).

    PEFT's own text initialisation would load the tokenizer again, by a path that it keeps in the config.
    """
    import torch

    words = model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        started = words(_repeated(tokenizer, text, length).to(words.weight.device))[0]
        model.prompt_encoder[model.active_adapter].embedding.weight.copy_(started)


def _repeated(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """The text's token ids, ``(1, length)``, cut or begun again as needed."""
    import torch

    ids = tokenizer(text).input_ids
    return torch.tensor([(ids * (length // max(len(ids), 1) + 1))[:length]])


def settle_adapter_config(folder: Path) -> None:
    """PEFT writes its sets in hash order: sort them, so that the file's bytes repeat."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save", "feedforward_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    write_json(path, dict(sorted(config.items())))
