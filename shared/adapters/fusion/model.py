"""The tuner: adapters of one kind, frozen, and what composes them."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from ..bottleneck import BottleneckModel
from ..bottleneck.invertible import final_norm
from ..bottleneck.layer import BottleneckLayer
from ..registry import AdapterError
from .config import FusionConfig
from .experts import make_expert
from .layer import FusedEmbedding, FusionLayer, fusion_class
from .mixers import make_mixer


class FusionModel(BottleneckModel):
    """A model with composed adapters; see `FusionConfig` for how, and `compose` to make one from folders.

    Only a fusion's mixers, or the adapter on top of a stack, are trainable.
    """

    prefix: str = "fusion_"
    tuner_layer_cls = FusionLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:  # noqa: ARG002
        if not isinstance(peft_config.target_modules, str):
            raise AdapterError("target_modules must be a regular expression of the adapted modules")
        return peft_config

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        kinds = {entry["peft_type"] for c in self.peft_config.values() for entry in c.adapters}
        if len(kinds) > 1:
            raise AdapterError(f"the model has composed adapters of {' and '.join(sorted(kinds))}")

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return check_target_module_exists(peft_config, key)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"(\.fusion_(?:experts|mixer|top))\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key)

    def _create_and_replace(
        self,
        peft_config: FusionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        if not isinstance(target, FusionLayer):
            wrapper = self._wrap(peft_config, target)
            self._replace_module(parent, target_name, wrapper, target)
            target = wrapper
        base = target.get_base_layer()
        hidden_size = self._text_config().hidden_size
        experts = [make_expert(entry, base, current_key, hidden_size) for entry in peft_config.adapters]
        mixer = None
        if peft_config.kind != "stack":
            assert experts[0] is not None
            mixer = make_mixer(peft_config, experts[0].width)
        device = next((p.device for p in chain(base.parameters(), parent.parameters())), None)
        target.add_fusion(adapter_name, experts, mixer, device)
        if adapter_name not in self.active_adapters:
            target.set_requires_grad(adapter_name, False)

    def _wrap(self, peft_config: FusionConfig, target: nn.Module) -> BottleneckLayer:
        if isinstance(target, nn.Embedding):
            return FusedEmbedding(target, final_norm(self.model, self.get_model_config(self.model)))
        return fusion_class(peft_config, target)(target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, BottleneckLayer):
            new_module = child.release()
        setattr(parent, child_name, new_module)
