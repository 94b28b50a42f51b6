"""From adapter folders to one composed adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuneutils.shared.errors import ExitCode, ToolError

from ..bottleneck import BottleneckConfig
from ..bottleneck.layer import initialise
from .config import KEPT, FusionConfig
from .experts import BottleneckExpert
from .layer import FusionLayer

#: A tensor of an adapter as PEFT saves it: the module's name, and the tensor's own.
KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)\.(?P<part>(?:bottleneck_\w+|lora_[AB])(?:\.[\w.]+)?)$")
#: The adapter on top of a stack, by itself.
TOP_KEY = re.compile(r"^base_model\.model\.(?P<module>.+?)\.fusion_top\.(?P<part>.+)$")
#: Settings under which a LoRA is more than ``scaling · B A`` beside a linear layer.
OTHER_LORA = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "velora_config", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config", "layer_replication", "target_parameters", "megatron_config", "lora_bias",
    "modules_to_save", "trainable_token_indices",
)  # fmt: skip
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Part:
    """One adapter of a composition, as its folder has it.

    Attributes:
        entry: of `FusionConfig.adapters`.
        tensors: by the module's name and the tensor's own.
    """

    entry: dict[str, Any]
    tensors: dict[tuple[str, str], torch.Tensor]

    @property
    def modules(self) -> set[str]:
        """Where the adapter sits."""
        return {module for module, _ in self.tensors}

    @property
    def layers(self) -> set[str]:
        """Where it sits in the layers: all but the embedding of an invertible adapter."""
        return {module for module, part in self.tensors if not part.startswith("bottleneck_coupling")}


def read_part(folder: str | Path, name: str) -> Part:
    """Read an adapter; of a stack, the one on its top.

    Raises:
        ToolError: it is neither a bottleneck nor a plain LoRA adapter, or holds other weights besides.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    entry = {"name": name, "peft_type": config.get("peft_type"), "config": config}
    key = KEY
    if entry["peft_type"] == "FUSION" and config["kind"] == "stack":
        entry, key = {**config["adapters"][-1], "name": name}, TOP_KEY
    if entry["peft_type"] not in KEPT:
        raise ToolError(
            f"{folder}: {entry['peft_type']}: only bottleneck and LoRA adapters can be composed",
            code=ExitCode.USAGE,
        )
    _check_plain(folder, entry["config"])
    kept = {k: entry["config"][k] for k in KEPT[entry["peft_type"]] if k in entry["config"]}
    tensors = {}
    for full, tensor in load_file(path / "adapter_model.safetensors").items():
        if found := key.match(full):
            tensors[found["module"], found["part"]] = tensor
        elif key is KEY:
            raise ToolError(f"{folder}: carries {full}, which cannot be composed", code=ExitCode.USAGE)
    return Part({**entry, "config": kept}, tensors)


def _check_plain(folder: str | Path, config: dict[str, Any]) -> None:
    used = [name for name in OTHER_LORA if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        used.append("init_lora_weights")
    if used:
        raise ToolError(
            f"{folder}: has {used[0]}, so it is more than what it adds to the stream; it cannot be composed",
            code=ExitCode.USAGE,
        )


def composed_config(parts: Sequence[Part], kind: str, **settings: Any) -> FusionConfig:
    """The configuration that puts these adapters together.

    Args:
        settings: further fields of `FusionConfig`.

    Raises:
        ToolError: they adapt different modules, or do not go together (exit 2).
    """
    modules = sorted(set().union(*(part.modules for part in parts)))
    made = FusionConfig(
        kind=kind,
        adapters=[part.entry for part in parts],
        target_modules="|".join(map(re.escape, modules)),
        task_type="CAUSAL_LM",
        **settings,
    )
    first, *others = (part for part in parts if part.tensors)  # one still to be trained has none
    for other in others:
        if apart := first.layers ^ other.layers:
            raise ToolError(
                f"{first.entry['name']} and {other.entry['name']} adapt different modules, such as "
                f"{min(apart)}; only adapters of the same modules can be composed",
                code=ExitCode.USAGE,
            )
    return made


def load_parts(model: Any, parts: Sequence[Part]) -> None:
    """Put the adapters' weights into a composed PEFT model; in a stack that lacks its last, that one stays.

    Raises:
        ToolError: weights that the model has no place for, or lacks.
    """
    from peft import set_peft_model_state_dict

    state = saved_state(model.peft_config["default"], parts)
    try:
        found = set_peft_model_state_dict(model, state)
    except RuntimeError as exc:
        raise ToolError(f"the adapters do not fit the model: {' '.join(str(exc).split())[:200]}") from exc
    lacking = [k for k in found.missing_keys if ".fusion_experts." in k]
    if lost := [*found.unexpected_keys, *lacking]:
        raise ToolError(f"the adapters do not fit the model: no match for {lost[0]}")


def compose(model: nn.Module, parts: Sequence[Part], kind: str, **settings: Any) -> Any:
    """A PEFT model of the base with these adapters composed; mixers are new.

    Args:
        settings: further fields of `FusionConfig`.
    """
    from peft import get_peft_model

    made = get_peft_model(model, composed_config(parts, kind, **settings))  # type: ignore[arg-type]
    load_parts(made, parts)
    return made


def stack_on(model: nn.Module, under: Part, config: BottleneckConfig, name: str) -> Any:
    """A PEFT model of the base with a frozen adapter and a new one on top of it, which alone is trained.

    Args:
        config: of the new adapter; it sits where the frozen one does.
        name: of the new adapter.

    Raises:
        ToolError: the two do not go together (exit 2).
    """
    from peft import get_peft_model

    if config.dropout or config.layers_to_transform or config.target_modules or config.modules_to_save:
        raise ToolError(
            "an adapter on top of another takes its places, all of them, and no dropout", code=ExitCode.USAGE
        )
    settings = {k: getattr(config, k) for k in KEPT["BOTTLENECK"]}
    top = Part({"name": name, "peft_type": "BOTTLENECK", "config": settings}, {})
    made = get_peft_model(model, composed_config([under, top], "stack"))  # type: ignore[arg-type]
    for module in made.modules():
        if isinstance(module, FusionLayer) and "default" in module.fusion_top:
            new = module.fusion_top["default"]
            if isinstance(new, BottleneckExpert):
                initialise(new.bottleneck_down, new.bottleneck_up, config.init_weights)
    load_parts(made, [under])
    return made


def write_parts(
    folder: Path, parts: Sequence[Part], kind: str, base: str, revision: str | None = None
) -> None:
    """Write a composed adapter without its base; only a stack has no parameters of its own.

    Args:
        base: the base model, as the configuration names it.
    """
    from safetensors.torch import save_file

    config = composed_config(parts, kind)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    state = saved_state(config, parts)
    config.save_pretrained(str(folder))
    save_file({k: v.contiguous() for k, v in sorted(state.items())}, folder / "adapter_model.safetensors")


def saved_state(config: FusionConfig, parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """The adapters' tensors under the names that PEFT saves a composed adapter by."""
    state = {}
    for index, part in enumerate(parts):
        on_top = config.kind == "stack" and index == len(config.adapters) - 1
        place = "fusion_top" if on_top else f"fusion_experts.{index}"
        for (module, name), tensor in part.tensors.items():
            state[f"base_model.model.{module}.{place}.{name}"] = tensor
    return state
