"""The tuner: where in a model the adapters go."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from ..registry import AdapterError
from .architectures import ARCHITECTURES, find_architecture
from .invertible import InvertibleEmbedding, embedding_name, final_norm
from .layer import BottleneckLayer, layer_class, refuse_merge


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022).

    Several adapters form a stack in the order given to ``model.base_model.set_adapter(["lang", "task"])``:
    the task adapter reads what the language adapter wrote (parallel adapters all read the MLP's input and add
    up). All adapters of one model have one style. Adapters made active are trainable; freeze one with
    ``model.set_requires_grad("lang", False)``.

    Example:
        ```py
        >>> import tuneutils.shared.adapters
        >>> from peft import get_peft_model
        >>> config = tuneutils.shared.adapters.BottleneckConfig(style="pfeiffer", task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        ```
    """

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    # Empty: the default modules depend on the style too, so `_prepare_adapter_config` finds them.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        text_config = self._text_config()
        if peft_config.hidden_size is None and getattr(text_config, "hidden_size", None) is None:
            raise AdapterError("the model's config has no hidden_size; give hidden_size")
        n_layers = getattr(text_config, "num_hidden_layers", None)
        for index in peft_config.layers_to_transform or []:
            if n_layers is not None and not 0 <= index < n_layers:
                raise AdapterError(
                    f"layers_to_transform has {index}, but the model's layers are 0 to {n_layers - 1}"
                )
        if peft_config.target_modules is None:
            peft_config.target_modules = _default_targets(peft_config.style, model_config)
        if peft_config.invertible:
            final_norm(self.model, model_config)
            peft_config.target_modules = _with(peft_config.target_modules, embedding_name(self.model))
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        styles = {getattr(other, "style", None) for other in self.peft_config.values()} - {config.style}
        if styles:
            raise AdapterError(
                f"the model has adapters of style {styles.pop()!r}; one of style {config.style!r} cannot "
                "join them, since it wraps other modules; use one style for all"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        layers = peft_config.layers_to_transform
        if not found or layers is None or not isinstance(peft_config.target_modules, str):
            return found
        # PEFT ignores layers_to_transform for a regular expression.
        index = re.search(r"\.(\d+)(?:\.|$)", f".{key}")
        return peft_config.invertible if index is None else int(index[1]) in layers

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.bottleneck_\w+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,  # noqa: ARG002
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        if not isinstance(target, BottleneckLayer):
            wrapper = self._wrap(peft_config, target)
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        # Not stored in the config: loading onto a base of another width must fail on the weights' shapes.
        hidden_size = peft_config.hidden_size or self._text_config().hidden_size
        # A wrapped dropout has no parameter to tell the device by; its neighbours have.
        parameters = chain(target.get_base_layer().parameters(), parent.parameters())
        device = next((parameter.device for parameter in parameters), None)
        target.update_layer(adapter_name, peft_config, hidden_size, device)
        if adapter_name not in self.active_adapters:
            # A further adapter is not trainable until it is made active.
            target.set_requires_grad(adapter_name, False)

    def _wrap(self, peft_config: Any, target: nn.Module) -> BottleneckLayer:
        if peft_config.invertible and isinstance(target, nn.Embedding):
            return InvertibleEmbedding(target, final_norm(self.model, self.get_model_config(self.model)))
        return layer_class(peft_config.style, target)(target)

    def _text_config(self) -> Any:
        # The object, as it knows other names of a field (GPT-2: n_embd), which its dictionary does not.
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, BottleneckLayer):
            new_module = child.release()
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        refuse_merge()


def _with(targets: Any, name: str) -> str:
    """A regular expression of the targets, which is one or names, and one more module."""
    if not isinstance(targets, str):
        targets = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(targets)))})"
    return str(targets) if re.fullmatch(targets, name) else f"{targets}|{re.escape(name)}"


def _default_targets(style: str, model_config: dict[str, Any]) -> str:
    model_type = model_config.get("model_type")
    architecture = find_architecture(model_config)
    if architecture is None:
        raise AdapterError(
            f"no default modules for architecture {model_type!r}; give target_modules "
            f"(known: {', '.join(sorted(ARCHITECTURES))})"
        )
    pattern = architecture.pattern(style)
    if pattern is None:
        raise AdapterError(
            f"style {style!r} needs the MLP as one module, which architecture {model_type!r} lacks; "
            "use houlsby or pfeiffer"
        )
    return pattern
