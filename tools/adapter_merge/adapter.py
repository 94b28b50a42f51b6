"""What an adapter's files say it does to each weight of its base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import ModelRef
from tuneutils.tools.adapter_merge.tensorfile import TensorFile

STREAMED = ("LORA", "IA3", "TRAINABLE_TOKENS")
NEVER_MERGED = {
    "PREFIX_TUNING": "prefix tuning feeds keys and values to attention",
    "PROMPT_TUNING": "prompt tuning feeds extra input vectors",
    "MULTITASK_PROMPT_TUNING": "prompt tuning feeds extra input vectors",
    "P_TUNING": "p-tuning feeds extra input vectors",
    "CPT": "context-aware prompt tuning feeds extra input vectors",
    "CARTRIDGE": "a cartridge feeds keys and values to attention",
    "ADAPTION_PROMPT": "LLaMA-Adapter's gated prompts act beside attention",
    "BOTTLENECK": "bottleneck adapters are not linear",
    "FUSION": "what composes its adapters depends on the input",
    "XLORA": "X-LoRA's gates depend on the input",
    "POLY": "Poly's routing depends on the task",
}
#: LoRA settings whose ΔW is not ``scaling · B·A`` on the base as stored; PEFT computes these.
OTHER_LORA = (
    "use_qalora", "alora_invocation_tokens", "velora_config", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config", "layer_replication", "target_parameters", "megatron_config",
)  # fmt: skip
#: Initialisations that change the base. PEFT makes the change again at load if it follows from the weights.
REPEATABLE_INITS = ("pissa", "olora")
UNREPEATABLE_INITS = ("pissa_niter", "corda", "loftq", "lora_ga")

KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|ia3_l|(?:token_adapter\.)?trainable_tokens_delta"
    r"|base_layer\.weight|base_layer\.bias)$"
)


@dataclass(frozen=True)
class Factors:
    """ΔW = b @ a, scaling included in ``b``; all float32.

    Attributes:
        a: (rank, in), ``b``: (out, rank).
        transposed: the base stores this weight as (in, out): GPT-2's Conv1D, and embeddings.
        embedding: the factors belong to an embedding.
    """

    a: torch.Tensor
    b: torch.Tensor
    transposed: bool = False
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW as the base stores it."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of ΔW as the base stores it."""
        if self.transposed:
            return self.a[:, start:stop].T @ self.b.T
        return self.b[start:stop] @ self.a

    def dense(self) -> torch.Tensor:
        return self.rows(0, self.shape[0])


@dataclass
class Adapter:
    """One adapter folder: its configuration, and its tensors by module."""

    path: Path
    config: dict[str, Any]
    manifest: Mapping[str, Any]
    base: ModelRef
    file: TensorFile
    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        return str(self.config["peft_type"])

    def part(self, module: str, name: str) -> torch.Tensor | None:
        """A tensor of a module in float32, or None."""
        key = self.modules[module].get(name)
        if key is None:
            return None
        tensor = self.file.read(key).float()
        if not bool(tensor.isfinite().all()):
            raise ToolError(f"{self.path}: {key}: holds values that are not finite; train it again")
        return tensor

    def scaling(self, module: str, rank: int) -> float:
        """α/r, or α/√r for rsLoRA (Kalajdzievski 2023, equation 5), with PEFT's alpha patterns."""
        patterns = self.config.get("alpha_pattern") or {}
        matched = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
        alpha = patterns[matched] if matched is not None else self.config["lora_alpha"]
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def factors(self, module: str, transposed: bool) -> Factors | None:
        """The module's low-rank update, or None."""
        embedding = "lora_embedding_A" in self.modules[module]
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        a, b = (self.part(module, name) for name in names)
        if a is None or b is None:
            return None
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ToolError(f"{self.path}: {module}: factors of shapes {list(b.shape)} and {list(a.shape)}")
        return Factors(a, b * self.scaling(module, a.shape[0]), embedding or transposed, embedding)

    def only_lora(self) -> str | None:
        """Why this adapter's effect is not a sum of low-rank updates, or None."""
        if self.type != "LORA":
            return f"is {self.type}, not LoRA"
        if self.config.get("use_dora"):
            return "is DoRA, whose magnitudes do not add up"
        if reason := self.needs_peft():
            return reason
        parts = {p for found in self.modules.values() for p in found}
        if self.whole or "lora_B.bias" in parts or "base_layer.bias" in parts:
            names = sorted(self.whole)[:1] or ["biases"]
            return f"carries whole weights ({names[0]}), which do not add up"
        if any("trainable_tokens_delta" in p for p in parts):
            return "carries whole token rows, which do not add up"
        return None

    def needs_peft(self) -> str | None:
        """Why only PEFT's own code knows what this adapter does to its base, or None."""
        if self.type not in STREAMED:
            return f"no streaming rule for {self.type}"
        used = [name for name in OTHER_LORA if self.config.get(name)]
        if used:
            return f"LoRA with {used[0]}"
        init = str(self.config.get("init_lora_weights")).lower()
        return f"the initialisation {init!r} changed the base" if init in REPEATABLE_INITS else None


def open_adapter(ref: ModelRef) -> Adapter:
    """Read an adapter's configuration and the names of its tensors.

    Raises:
        ToolError: its method cannot be merged at all, or its base cannot be known again.
    """
    assert ref.base is not None
    path = Path(ref.path)
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    kind = config.get("peft_type")
    if kind in NEVER_MERGED or not kind:
        why = NEVER_MERGED.get(kind, "its peft_type is not known")
        raise ToolError(
            f"{path}: {kind} cannot be merged: {why}, so no base weights equal base plus adapter; "
            "keep it as an adapter beside its base"
        )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(UNREPEATABLE_INITS):
        raise ToolError(
            f"{path}: the initialisation {init!r} changed the base in a way that cannot be computed again; "
            "save the adapter as plain LoRA (save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    made = Adapter(path, config, ref.manifest, ref.base, TensorFile(path / "adapter_model.safetensors"))
    for key in made.file.specs:
        found = KEY.match(key)
        if found:
            part = found["part"].replace("token_adapter.", "").replace("vector.weight", "vector")
            made.modules.setdefault(found["module"], {})[part] = key
        else:
            made.whole[key.removeprefix("base_model.model.")] = key
    if not made.modules and not made.whole:
        raise ToolError(f"{path}: the adapter holds no tensors")
    return made


def same_base(adapters: Sequence[Adapter]) -> None:
    """Require that all adapters stand on one base.

    Raises:
        ToolError: naming the first that differs.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if _identity(other) != _identity(first):
            raise ToolError(
                f"{other.path}: its base {other.base.given} is not {first.base.given}, that of {first.path}; "
                "only adapters of one base can be merged"
            )


def _identity(adapter: Adapter) -> str:
    base = adapter.base
    return f"{base.path}@{base.revision}" if base.kind == "hub" else str(Path(base.path).resolve())
