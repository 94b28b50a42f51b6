"""AWQ (Lin et al. 2023, arXiv 2306.00978): scale up the channels that matter before rounding, exactly undone.

A channel scaled by ``s`` in the weights that read it and by ``1/s`` in what writes it computes the same, but
its weights are rounded ``s`` times finer (section 3.2). ``s = mean|x|^alpha``, the best of 20 ``alpha`` by
the error of the outputs (equations 4 and 5), which the Gram matrix of the inputs gives without running them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor, nn

from tuneutils.shared.errors import ToolError
from tuneutils.shared.layerwise import layer_parts
from tuneutils.shared.quantizers import Grid, fake_quantize, fit

ALPHAS = 20


@dataclass
class Pair:
    """What reads a channel, and what writes it.

    Attributes:
        readers: names of linears whose columns are scaled up.
        writer: name of the RMSNorm, or of the linear whose rows, are scaled down.
        heads: (query heads, kept heads) where each written channel is read by several query heads.
    """

    readers: list[str]
    writer: str
    heads: tuple[int, int] | None = None

    def reduce(self, values: Tensor, how: Callable[[Tensor, int], Tensor]) -> Tensor:
        """From one value a column read to one a channel written."""
        if self.heads is None:
            return values
        query, kept = self.heads
        return how(values.view(kept, query // kept, -1), 1).flatten()

    def expand(self, values: Tensor) -> Tensor:
        """From one value a channel written to one a column read."""
        if self.heads is None:
            return values
        query, kept = self.heads
        return values.view(kept, 1, -1).expand(kept, query // kept, -1).flatten()


def pairs(layer: nn.Module, config: Any, name: str) -> list[Pair]:
    """The scalings that leave a layer of the Llama layout as it is.

    Raises:
        ToolError: modules of that layout are missing, or a norm does not just multiply by its weight.
    """
    parts = layer_parts(layer, name)
    names = {id(module): inner for inner, module in layer.named_modules()}
    for role in ("attention_norm", "mlp_norm"):
        _check_norm(parts[role], f"{name}.{names[id(parts[role])]}")

    def of(*roles: str) -> list[str]:
        return [names[id(parts[role])] for role in roles]

    text = config.get_text_config()
    heads = (text.num_attention_heads, text.num_key_value_heads or text.num_attention_heads)
    return [
        Pair(of("q", "k", "v"), *of("attention_norm")),
        Pair(of("o"), *of("v"), heads=heads),
        Pair(of("gate", "up"), *of("mlp_norm")),
        Pair(of("down"), *of("up")),
    ]


def _check_norm(norm: nn.Module, name: str) -> None:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    probe = torch.ones(1, len(weight), dtype=weight.dtype, device=weight.device)
    kept = weight.data
    try:
        weight.data = torch.zeros_like(kept)
        silent = not norm(probe).any()
    finally:
        weight.data = kept
    if not silent:
        raise ToolError(f"{name}: {type(norm).__name__} does not just multiply by its weight; use gptq")


def search_scale(
    weights: Sequence[Tensor], gram: Tensor, magnitude: Tensor, grid: Grid, pair: Pair
) -> Tensor:
    """The scale ``(channels written,)`` of the least output error, 1 at its geometric middle.

    Args:
        weights: ``(rows, columns)`` of the readers, float32.
        gram: ``(columns, columns)`` of their inputs.
        magnitude: ``(columns,)`` mean absolute inputs.
    """
    activity = pair.reduce(magnitude, lambda values, axis: values.mean(axis)).clamp(min=1e-6)
    weight = torch.cat(list(weights))
    best, least = torch.ones_like(activity), _output_error(weight, gram, None, grid)
    for step in range(1, ALPHAS):
        scale = activity.pow(step / ALPHAS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = _output_error(weight, gram, pair.expand(scale), grid)
        if error < least:
            best, least = scale, error
    return best


def _output_error(weight: Tensor, gram: Tensor, scale: Tensor | None, grid: Grid) -> float:
    """``||W X - Q(W s) (X / s)||^2``."""
    scaled = weight if scale is None else weight * scale
    rounded = fake_quantize(scaled, grid, fit(scaled, grid))
    difference = weight - (rounded if scale is None else rounded / scale)
    return float(((difference @ gram) * difference).sum())


def apply_scale(weights: dict[str, Tensor], pair: Pair, scale: Tensor, writer_dtype: torch.dtype) -> None:
    """Scale the stored weights of a layer in place, in their own precision.

    Args:
        weights: name within the layer -> weight (a bias under ``NAME.bias``).
        writer_dtype: precision in which a norm's weight will be stored. It is rounded to it first, and the
            readers get exactly the inverse of what became of it.
    """
    writer = weights[pair.writer]
    if writer.dim() == 1:
        written = (writer / scale).to(writer_dtype).to(writer.dtype)
        exact = torch.where(written != 0, writer / written, torch.ones_like(writer))
        weights[pair.writer] = torch.where(written != 0, written, writer)
    else:
        exact = scale
        weights[pair.writer] = writer / scale[:, None]
        if (bias := weights.get(f"{pair.writer}.bias")) is not None:
            weights[f"{pair.writer}.bias"] = bias / scale
    for reader in pair.readers:
        weights[reader] = weights[reader] * pair.expand(exact)
