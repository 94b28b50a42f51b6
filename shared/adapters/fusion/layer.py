"""The modules that hold composed adapters around a wrapped module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from ..bottleneck.invertible import Coupling, InvertibleEmbedding
from ..bottleneck.layer import (
    BottleneckLayer,
    OutputBottleneck,
    ParallelBottleneck,
    PostNormBottleneck,
    layer_class,
)
from ..registry import AdapterError
from .config import FusionConfig


class FusionLayer(BottleneckLayer):
    """A wrapped module with composed adapters; a subclass also names where bottlenecks of its style act.

    Under each name there are the frozen adapters, by their index, and either a mixer or the trained adapter
    on top of the stack. The frozen ones are no "adapter layers" in PEFT's sense: nothing makes them train.

    Attributes:
        forced: ``(N,)`` weights in place of the mixer's, with the identity as V; None for the mixer's own.
        recorded: where the weights ``(..., N)`` of each pass go; None for nowhere.
    """

    adapter_layer_names: tuple[str, ...] = ("fusion_mixer", "fusion_top")
    other_param_names: tuple[str, ...] = ("fusion_experts",)

    def __init__(self, base_layer: nn.Module, *args: nn.Module) -> None:
        super().__init__(base_layer, *args)
        self.fusion_experts = nn.ModuleDict()
        self.fusion_mixer = nn.ModuleDict()
        self.fusion_top = nn.ModuleDict()
        self.forced: torch.Tensor | None = None
        self.recorded: list[torch.Tensor] | None = None

    def add_fusion(
        self,
        adapter_name: str,
        experts: Sequence[nn.Module | None],
        mixer: nn.Module | None,
        device: torch.device | None,
    ) -> None:
        """Add a composition of that name: fused by a mixer, or without one a stack of these adapters.

        Args:
            experts: one for each adapter, in order; None for an adapter that has nothing here.
        """
        frozen = {str(i): e for i, e in enumerate(experts) if e is not None}
        top = None if mixer is not None else frozen.pop(str(len(experts) - 1), None)
        self.fusion_experts[adapter_name] = nn.ModuleDict(frozen).requires_grad_(False)
        if mixer is not None:
            self.fusion_mixer[adapter_name] = mixer
        elif top is not None:
            self.fusion_top[adapter_name] = top
        self._move_adapter_to_device_of_base_layer(adapter_name, device)

    def working_adapters(self) -> list[str]:
        """What acts here, in order: a fusion under its name, each adapter of a stack as ``name/index``."""
        if self.disable_adapters:
            return []
        made = []
        for name in self.active_adapters:
            if name in self.fusion_mixer:
                made.append(name)
            elif name in self.fusion_experts:
                made += [f"{name}/{i}" for i in range(len(self._experts(name)) + 1)]
        return made

    def _experts(self, adapter_name: str) -> list[nn.Module]:
        return list(cast(nn.ModuleDict, self.fusion_experts[adapter_name]).values())

    def adapter_output(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What one of `working_adapters` adds; the stream that the adapters read is also the query."""
        return self.output_for(adapter_name, x, x)

    def output_for(self, step: str, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What one of `working_adapters` adds.

        Args:
            query: ``(..., d)``, the frozen module's output. x: ``(..., d_in)``, what the adapters read.
        """
        if step in self.fusion_mixer:
            return self._mixed(step, query, x)
        name, _, index = step.rpartition("/")
        stack = [*self._experts(name), self.fusion_top[name]]
        return cast(torch.Tensor, stack[int(index)](x))

    def _mixed(self, name: str, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        outputs = torch.stack([expert(x) for expert in self._experts(name)], dim=-2)
        if self.forced is not None:
            return self.forced.to(outputs) @ outputs
        mixed, weights = self.fusion_mixer[name](query.to(outputs.dtype), outputs)
        if self.recorded is not None:
            self.recorded.append(weights.detach())
        return cast(torch.Tensor, mixed)


class FusedOutput(FusionLayer, OutputBottleneck):
    """Composed adapters on the wrapped module's output."""


class FusedPostNorm(FusionLayer, PostNormBottleneck):
    """Composed adapters around a post-norm layer's last norm."""


class FusedParallel(FusionLayer, ParallelBottleneck):
    """Composed adapters beside the wrapped module, whose output is the query: parallel bottlenecks, LoRAs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        steps = self.working_adapters()
        if not steps:
            return output
        u = args[0] if args else next(iter(kwargs.values()))
        hidden = output[0] if isinstance(output, tuple) else output
        adapted = hidden
        for step in steps:
            adapted = adapted + self.output_for(step, hidden, u)
        adapted = adapted.to(hidden.dtype)
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


class FusedEmbedding(FusionLayer, InvertibleEmbedding):
    """The couplings of a stack's adapters at the input embedding."""

    def couplings(self) -> list[Coupling]:
        """The couplings that act, from the lowest adapter to the top."""
        if self.disable_adapters:
            return []
        here = [n for n in self.active_adapters if n in self.fusion_experts]
        tops = {n: [self.fusion_top[n]] if n in self.fusion_top else [] for n in here}
        return [cast(Coupling, e.bottleneck_coupling) for n in here for e in [*self._experts(n), *tops[n]]]


PLACES: dict[type[BottleneckLayer], type[FusionLayer]] = {
    OutputBottleneck: FusedOutput,
    PostNormBottleneck: FusedPostNorm,
    ParallelBottleneck: FusedParallel,
}


def fusion_class(config: FusionConfig, module: nn.Module) -> type[FusionLayer]:
    """The wrapper that composes adapters of the config's style in their published place at ``module``."""
    place = layer_class(config.style, module)
    if place not in PLACES:
        raise AdapterError("parallel adapters of post-norm models cannot be composed")
    return PLACES[place]


def fusion_layers(model: nn.Module) -> dict[str, FusionLayer]:
    """The places of a model where a mixer acts, by name, in order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusionLayer) and len(m.fusion_mixer)}


@contextmanager
def recorded_weights(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the mixers' weights ``(..., N)`` of every pass meanwhile, by the name of the place."""
    layers = fusion_layers(model)
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.recorded = kept[name]
    try:
        yield kept
    finally:
        for layer in layers.values():
            layer.recorded = None


@contextmanager
def forced_weights(model: nn.Module, weights: Sequence[float]) -> Iterator[None]:
    """Mix by given weights everywhere meanwhile; a one-hot is that adapter alone."""
    layers = fusion_layers(model)
    for layer in layers.values():
        layer.forced = torch.tensor(weights)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.forced = None
