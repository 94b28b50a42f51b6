"""MAD-X's invertible adapters: a bijection on the input embeddings, and its inverse before the output's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..registry import AdapterError
from .architectures import find_architecture
from .config import BottleneckConfig
from .layer import BottleneckLayer


class Coupling(nn.Module):
    """NICE's additive coupling (Dinh et al. 2015, section 3.2) as MAD-X has it (section 2.2.2).

    With ``e = [e1, e2]``: ``o1 = e1 + F(e2)``, ``o2 = e2 + G(o1)``; both F and G are ``up(f(down(x)))``. Its
    Jacobian's determinant is 1 whatever the weights are. F and G start at zero, the whole as the identity.

    Args:
        width: of the embeddings.
        size: width inside F and G; None: a quarter of ``width`` (as published).
        non_linearity: f, an activation name of transformers.
    """

    def __init__(self, width: int, size: int | None = None, non_linearity: str = "relu") -> None:
        super().__init__()
        self.sizes = [width // 2, width - width // 2]
        first, second = self.sizes
        size = size or max(1, width // 4)
        self.f_down, self.f_up = nn.Linear(second, size), nn.Linear(size, first)
        self.g_down, self.g_up = nn.Linear(first, size), nn.Linear(size, second)
        self.act = ACT2FN[non_linearity]
        for down, up in ((self.f_down, self.f_up), (self.g_down, self.g_up)):
            nn.init.normal_(down.weight, std=0.02)
            nn.init.zeros_(down.bias)
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        """``(..., width)`` to ``(..., width)``, in the weights' precision."""
        e1, e2 = torch.split(e.to(self.f_down.weight.dtype), self.sizes, dim=-1)
        o1 = e1 + self._f(e2)
        return torch.cat([o1, e2 + self._g(o1)], dim=-1).to(e.dtype)

    def inverse(self, o: torch.Tensor) -> torch.Tensor:
        """What `forward` makes ``o`` from: ``e2 = o2 - G(o1)``, ``e1 = o1 - F(e2)``."""
        o1, o2 = torch.split(o.to(self.f_down.weight.dtype), self.sizes, dim=-1)
        e2 = o2 - self._g(o1)
        return torch.cat([o1 - self._f(e2), e2], dim=-1).to(o.dtype)

    def _f(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.f_up(self.act(self.f_down(x))))

    def _g(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.g_up(self.act(self.g_down(x))))


class InvertibleEmbedding(BottleneckLayer):
    """The input embedding with named couplings, each undone at the model's last norm, in opposite order.

    The inverse is a hook on that norm: what comes out of it is what the output embedding reads.

    Args:
        base_layer: the embedding.
        final_norm: the last module before the output embedding.
    """

    adapter_layer_names: tuple[str, ...] = ("bottleneck_coupling",)
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, final_norm: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottleneck_coupling = nn.ModuleDict()
        self._hook = final_norm.register_forward_hook(self._undo)

    def update_layer(
        self, adapter_name: str, config: BottleneckConfig, hidden_size: int, device: torch.device | None
    ) -> None:
        """Add a coupling of that name, replacing one that is there."""
        assert config.non_linearity is not None
        made = Coupling(hidden_size, config.invertible_size, config.non_linearity)
        self.bottleneck_coupling[adapter_name] = made
        self._move_adapter_to_device_of_base_layer(adapter_name, device)

    def working_adapters(self) -> list[str]:
        """Names of the adapters whose couplings take part here, in order."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.bottleneck_coupling]

    def couplings(self) -> list[Coupling]:
        """The couplings that act, in order."""
        return [cast(Coupling, self.bottleneck_coupling[name]) for name in self.working_adapters()]

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        embedded = cast(torch.Tensor, self.base_layer(*args, **kwargs))
        for coupling in self.couplings():
            embedded = coupling(embedded)
        return embedded

    def _undo(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        for coupling in reversed(self.couplings()):
            output = coupling.inverse(output)
        return output

    def release(self) -> nn.Module:
        self._hook.remove()
        return super().release()


def embedding_name(model: nn.Module) -> str:
    """The name of a model's input embedding among its modules."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, BottleneckLayer):
        embedding = embedding.get_base_layer()
        return next(n for n, m in model.named_modules() if m is embedding).removesuffix(".base_layer")
    return next(n for n, m in model.named_modules() if m is embedding)


def final_norm(model: nn.Module, model_config: dict[str, Any]) -> nn.Module:
    """The module whose output a causal language model's output embedding reads.

    Raises:
        AdapterError: the architecture has no such module, or is not known.
    """
    architecture = find_architecture(model_config)
    if architecture is None or architecture.final_norm is None:
        raise AdapterError(
            f"invertible adapters: architecture {model_config.get('model_type')!r} has no known last norm "
            "to undo them at"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == architecture.layers:
            body = model.get_submodule(name.rpartition(".")[0])
            if "vision" not in name and hasattr(body, architecture.final_norm):
                return cast(nn.Module, getattr(body, architecture.final_norm))
    raise AdapterError(f"invertible adapters: the model has no {architecture.final_norm} after its layers")
