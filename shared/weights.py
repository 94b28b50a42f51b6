"""A model's stored weights, read a few at a time, so that memory holds what is worked on and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor, nn

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef

INDEX = "model.safetensors.index.json"


class Weights:
    """The safetensors files of one full-precision model.

    Attributes:
        given: the model's name as the user gave it.
        folder: where its files are.
        config: the contents of ``config.json``.

    Raises:
        ToolError: an adapter, a GGUF file, or a model that is already stored quantized (65).
    """

    def __init__(self, ref: ModelRef, *, trust_remote_code: bool = False) -> None:
        self.given = ref.given
        self.trust_remote_code = trust_remote_code
        self.folder = _folder(ref)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if quantized := self.config.get("quantization_config"):
            method = quantized.get("quant_method", "an unnamed method")
            raise ToolError(
                f"{ref.given}: already quantized ({method}); name the full-precision model it was made from"
            )
        self.files = _tensor_files(self.folder)
        self._keys: dict[str, str] = {}

    def skeleton(self) -> Any:
        """The causal language model with its parameters on the meta device, in eval mode."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError) as exc:
            reason = " ".join(str(exc).split())[:200]
            raise ToolError(f"{self.given}: no causal language model: {reason}") from exc
        return model.eval()

    def check_names(self, model: Any) -> None:
        """Find each parameter of the model in the files; older files leave out the base model's prefix.

        Raises:
            ToolError: parameters that the files lack (65), the first of them named.
        """
        prefix = f"{model.base_model_prefix}."
        missing = []
        tied = dict(getattr(model, "all_tied_weights_keys", {}) or {})
        for name, _ in model.named_parameters(remove_duplicate=False):
            short = name.removeprefix(prefix)
            found = name if name in self.files else short if short in self.files else None
            if found is not None:
                self._keys[name] = found
            elif name not in tied:
                missing.append(name)
        if missing:
            raise ToolError(
                f"{self.given}: {len(missing)} weights of a {type(model).__name__} are not in its files, "
                f"such as {missing[0]}; they may be stored under other names"
            )

    def key(self, parameter: str) -> str:
        """A parameter's name in the files."""
        return self._keys.get(parameter, parameter)

    def read(self, *keys: str) -> dict[str, Tensor]:
        """Copies of some tensors, by the files' names, as stored; the files are unmapped again at once."""
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files[key], []).append(key)
        out: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as stream:
                    for key in wanted:
                        out[key] = stream.get_tensor(key).clone()
            except (OSError, SafetensorError) as exc:
                raise ToolError(f"{path}: cannot read: {exc}") from exc
        return out

    def specs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in the files -> safetensors' name of the dtype, and shape."""
        from safetensors import safe_open

        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, framework="pt") as stream:
                for key in stream.keys():  # noqa: SIM118 - no mapping
                    view = stream.get_slice(key)
                    found[key] = (view.get_dtype(), tuple(view.get_shape()))
        return found

    def fill(
        self,
        module: nn.Module,
        name: str,
        dtype: torch.dtype,
        where: torch.device,
        *,
        recurse: bool = True,
    ) -> None:
        """Load a module's parameters.

        Args:
            name: the module's full name in the model.

        Raises:
            ToolError: a weight that is not finite (65).
        """
        wanted = {}
        for inner, owner, leaf in _parameters(module, recurse):
            full = f"{name}.{inner}" if name else inner
            if self.key(full) in self.files:
                wanted[full] = (owner, leaf)
        read = self.read(*(self.key(full) for full in wanted))
        for full, (owner, leaf) in wanted.items():
            tensor = read.pop(self.key(full))
            check_finite(self.given, full, tensor)
            value = tensor.to(device=where, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def check_finite(given: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    low, high = tensor.aminmax()  # both NaN if any value is; far cheaper than isfinite of each
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        count = int((~torch.isfinite(tensor)).sum())
        raise ToolError(f"{given}: {name} has {count} values that are NaN or infinite; the model is damaged")


def _parameters(module: nn.Module, recurse: bool) -> Iterator[tuple[str, nn.Module, str]]:
    for prefix, owner in module.named_modules() if recurse else [("", module)]:
        for leaf in owner._parameters:
            if owner._parameters[leaf] is not None:
                yield (f"{prefix}.{leaf}" if prefix else leaf), owner, leaf


def _folder(ref: ModelRef) -> Path:
    if ref.kind == "adapter":
        raise ToolError(
            f"{ref.given}: an adapter; merge it into its base first: adapter-merge {ref.given} -o OUT"
        )
    if ref.kind == "gguf":
        raise ToolError(f"{ref.given}: a GGUF file; import it first: model-import {ref.given} -o OUT")
    if ref.kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(ref.path, revision=ref.revision, allow_patterns=patterns))
    return Path(ref.path)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({n for n in listed.values() if not (folder / n).is_file()})
        if absent:
            raise ToolError(f"{folder / absent[0]}: a shard is missing", code=ExitCode.MISSING_INPUT)
        return {name: folder / file for name, file in listed.items()}
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as stream:
            return dict.fromkeys(stream.keys(), path)
    except (OSError, SafetensorError) as exc:
        raise ToolError(f"{path}: cannot read: {exc}") from exc
