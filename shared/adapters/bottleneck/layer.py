"""The modules that hold bottleneck adapters around a wrapped module."""

from __future__ import annotations

import inspect
import math
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

from ..registry import AdapterError
from .config import BottleneckConfig


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A wrapped module with any number of named adapters.

    The active adapters are composed in the order in which they were activated: each reads what the one
    before it wrote (a stack, as MAD-X has it with the language adapter below the task adapter). Attributes
    that the wrapper lacks are read from the wrapped module: model code reads ``layer.self_attn.layer_idx``.

    Args:
        base_layer: the module to wrap.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_down", "bottleneck_up", "bottleneck_scaling")
    other_param_names: tuple[str, ...] = ("bottleneck_act", "bottleneck_dropout", "bottleneck_factor")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_scaling = nn.ParameterDict()
        self.bottleneck_act = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_factor: dict[str, float] = {}
        self._active_adapter: str | list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(
        self,
        adapter_name: str,
        config: BottleneckConfig,
        hidden_size: int,
        device: torch.device | None,
    ) -> None:
        """Add an adapter of that name, replacing one that is there."""
        size = config.size(hidden_size)
        self.bottleneck_down[adapter_name] = nn.Linear(hidden_size, size)
        self.bottleneck_up[adapter_name] = nn.Linear(size, hidden_size)
        self.bottleneck_act[adapter_name] = ACT2FN[config.non_linearity]
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        if config.scaling == "learned":
            self.bottleneck_scaling[adapter_name] = nn.Parameter(torch.ones(1))
        else:
            self.bottleneck_factor[adapter_name] = float(config.scaling or 0.0)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name, device)

    def reset_parameters(self, adapter_name: str, init_weights: str) -> None:
        """Initialise an adapter's weights; see `BottleneckConfig` for the schemes."""
        down = cast(nn.Linear, self.bottleneck_down[adapter_name])
        initialise(down, cast(nn.Linear, self.bottleneck_up[adapter_name]), init_weights)

    def adapter_output(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """``A(x)`` of one adapter, without a residual.

        Args:
            x: (..., hidden); cast to the adapter's dtype as PEFT's LoRA does.
        """
        down = cast(nn.Linear, self.bottleneck_down[adapter_name])
        x = self._cast_input_dtype(x, down.weight.dtype)
        x = self.bottleneck_up[adapter_name](self.bottleneck_act[adapter_name](down(x)))
        if adapter_name in self.bottleneck_scaling:
            x = x * self.bottleneck_scaling[adapter_name]
        else:
            x = x * self.bottleneck_factor[adapter_name]
        return cast(torch.Tensor, self.bottleneck_dropout[adapter_name](x))

    def working_adapters(self) -> list[str]:
        """Names of the adapters that take part in the forward pass here, in order."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.bottleneck_down]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def release(self) -> nn.Module:
        """Return the wrapped module as it was before it was wrapped."""
        return self.get_base_layer()

    def merge(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        refuse_merge()

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT looks for a weight on the wrapped module itself; a sublayer has it further down.
        for parameter in base_layer.parameters():
            return parameter.device, parameter.dtype
        return None, None


@torch.no_grad()
def initialise(down: nn.Linear, up: nn.Linear, init_weights: str) -> None:
    """Initialise one bottleneck; see `BottleneckConfig` for the schemes."""
    if init_weights == "mam_adapter":
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    elif init_weights == "houlsby":
        nn.init.trunc_normal_(down.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.trunc_normal_(up.weight, std=0.01, a=-0.02, b=0.02)
    else:
        nn.init.normal_(down.weight, std=0.02)
        nn.init.normal_(up.weight, std=0.02)
    if init_weights in ("zero-up", "mam_adapter"):
        nn.init.zeros_(up.weight)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.bias)


def refuse_merge() -> NoReturn:
    raise AdapterError(
        "bottleneck adapters cannot be merged: they are not linear, so no base weights equal base plus "
        "adapter; keep the adapter beside its base, or take it off with unload()"
    )


class OutputBottleneck(BottleneckLayer):
    """Adapters on the wrapped module's output: ``h`` becomes ``h + A(h)``; a tuple's first item is ``h``.

    A hook on the wrapped module does it, not this module's forward, so that whatever else observes that
    module sees the adapted output: transformers records ``hidden_states`` by hooks on the layers' class.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._hook = base_layer.register_forward_hook(self._adapt, prepend=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def release(self) -> nn.Module:
        self._hook.remove()
        return super().release()

    def _adapt(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        names = self.working_adapters()
        if not names:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        adapted = hidden
        for name in names:
            adapted = adapted + self.adapter_output(name, adapted)
        adapted = adapted.to(hidden.dtype)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class PostNormBottleneck(BottleneckLayer):
    """Adapters around a post-norm layer's last norm: ``norm(z)`` becomes ``norm(z + A(norm(z)))``."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        adapted = z
        for name in self.working_adapters():
            adapted = adapted + self.adapter_output(name, self.base_layer(adapted.to(z.dtype)))
        return cast(torch.Tensor, self.base_layer(adapted.to(z.dtype)))


class ParallelBottleneck(BottleneckLayer):
    """Adapters beside the wrapped module: ``module(u)`` becomes ``module(u) + A(u)``.

    Several active adapters all read ``u`` and add up, so their order does not matter.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        names = self.working_adapters()
        if not names:
            return output
        u = args[0] if args else next(iter(kwargs.values()))
        hidden = output[0] if isinstance(output, tuple) else output
        adapted = hidden
        for name in names:
            adapted = adapted + self.adapter_output(name, u)
        adapted = adapted.to(hidden.dtype)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class ParallelResidualBottleneck(BottleneckLayer):
    """Adapters beside a post-norm model's MLP, at the module that adds the MLP's input and normalises.

    ``norm(mlp(u) + u)`` becomes ``norm(mlp(u) + u + A(u))``, through that module's residual argument.
    """

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        residual = input_tensor
        for name in self.working_adapters():
            residual = residual + self.adapter_output(name, input_tensor)
        return cast(torch.Tensor, self.base_layer(hidden_states, residual.to(input_tensor.dtype)))


def layer_class(style: str, module: nn.Module) -> type[BottleneckLayer]:
    """The wrapper that puts an adapter of ``style`` in its published place at ``module``."""
    if style == "pfeiffer" and isinstance(module, nn.LayerNorm):
        return PostNormBottleneck
    if style == "parallel":
        takes_residual = "input_tensor" in inspect.signature(module.forward).parameters
        return ParallelResidualBottleneck if takes_residual else ParallelBottleneck
    return OutputBottleneck
