"""A causal language model one decoder layer at a time.

Finds the layers and their linear modules from the model's structure, runs calibration data through them
layer by layer, and can hold the weights of one layer only, read from the files as the walk gets there::

    decoder = open_decoder(resolve("artifacts/base"))
    for step in walk(decoder, ids):
        groups = step.observe_all(lambda name, inputs: ...)  # inputs: (tokens, columns), shared ones once
        step.linears["self_attn.q_proj"].weight.data = ...  # the next layer sees what this one now gives
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
import torch
from torch import Tensor, nn

from tuneutils.shared.errors import ToolError
from tuneutils.shared.weights import Weights

BATCH_TOKENS = 4096
Observer = Callable[[str, Tensor], None]

#: Role -> module, in the layout that Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma and kin share.
PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass
class Decoder:
    """The pieces of a causal language model.

    Attributes:
        model: the Transformers model; with ``weights``, its layers' parameters are on the meta device.
        prefix: the layers' name, such as ``model.layers``.
        layers: the decoder layers.
        embedding, head: names of the input embedding and the output projection.
        tied: the head shares the embedding's weight.
        weights: the files to read a layer from when it is its turn; None: all in memory.
    """

    model: Any
    prefix: str
    layers: nn.ModuleList
    embedding: str
    head: str
    tied: bool
    weights: Weights | None = None

    def linears(self) -> dict[str, nn.Linear]:
        """Full name -> linear module, of all layers, in the model's order."""
        return {
            f"{self.prefix}.{index}.{name}": module
            for index, layer in enumerate(self.layers)
            for name, module in layer_linears(layer).items()
        }


def decoder_of(model: Any, given: str = "model") -> Decoder:
    """Find a model's pieces.

    Args:
        given: the model's name in error messages.

    Raises:
        ToolError: it has no list of decoder layers, no embedding, no linear output projection, or layers
            without linear modules; the message says which.
    """
    names = {id(module): name for name, module in model.named_modules()}
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and "." not in name.removeprefix("model.")
    ] or [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    missing = []
    if not stacks:
        missing.append(f"a list of {count} decoder layers (such as model.layers)")
    elif not all(layer_linears(layer) for layer in stacks[0][1]):
        missing.append(f"linear modules in each of {stacks[0][0]}")
    if not isinstance(embedding, nn.Embedding):
        missing.append("an input embedding (such as model.embed_tokens)")
    if not isinstance(head, nn.Linear):
        missing.append("a linear output projection (such as lm_head)")
    if missing:
        raise ToolError(f"{given}: {type(model).__name__} lacks {'; '.join(missing)}")
    prefix, layers = stacks[0]
    tied = head.weight is embedding.weight or bool(getattr(model.config, "tie_word_embeddings", False))
    return Decoder(model, prefix, layers, names[id(embedding)], names[id(head)], tied)


def layer_linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Name within the layer -> linear module."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def layer_parts(layer: nn.Module, given: str = "layer") -> dict[str, nn.Module]:
    """Role (``q``, ``o``, ``gate``, ``attention_norm``, ...) -> module; see ``PARTS``.

    Raises:
        ToolError: modules of that layout are missing; the message names them all.
    """
    modules = dict(layer.named_modules())
    missing = [name for name in PARTS.values() if name not in modules]
    if missing:
        raise ToolError(f"{given}: a {type(layer).__name__} has no {', '.join(missing)}")
    return {role: modules[name] for role, name in PARTS.items()}


def open_decoder(weights: Weights, *, dtype: torch.dtype, where: torch.device | None = None) -> Decoder:
    """A model whose layers stay on disk until :func:`walk` reaches them.

    Args:
        dtype: of what is loaded.
        where: the device; the CPU by default.

    Raises:
        ToolError: the files lack weights that the architecture has, or name them otherwise.
    """
    model = weights.skeleton()
    decoder = decoder_of(model, weights.given)
    decoder.weights = weights
    where = where or torch.device("cpu")
    weights.check_names(model)
    inside = f"{decoder.prefix}."
    for name, module in list(model.named_modules()):
        if not name.startswith(inside):
            weights.fill(module, name, dtype, where, recurse=False)
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(where)
    return decoder


class _Seen(Exception):
    """Raised inside a layer once all that was asked for has been seen."""


@dataclass
class Step:
    """One layer's turn in a walk.

    Attributes:
        index, name: its place, and full name (``model.layers.3``).
        layer: the module, loaded; change its weights in place.
        inputs: ``(rows, length, hidden)`` hidden states that reach it; overwritten when the walk goes on.
    """

    index: int
    name: str
    layer: nn.Module
    inputs: Tensor
    _arguments: dict[int, Any]
    _batch_rows: int
    _outputs: Tensor | None = field(default=None, repr=False)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Name within the layer -> linear module."""
        return layer_linears(self.layer)

    def batches(self) -> Iterator[slice]:
        """The rows of each forward pass."""
        for start in range(0, len(self.inputs), self._batch_rows):
            yield slice(start, min(start + self._batch_rows, len(self.inputs)))

    @torch.no_grad()
    def run(self, rows: slice) -> Tensor:
        """The layer's outputs ``(rows, length, hidden)`` for some rows, with its weights as they stand."""
        hidden = self.inputs[rows]
        args, kwargs = self._arguments[len(hidden)]
        out = self.layer(hidden, *args, **kwargs)
        made: Tensor = out[0] if isinstance(out, tuple) else out
        return made

    def outputs(self) -> Tensor:
        """All outputs; kept, and given to the next layer, unless ``changed`` is called."""
        if self._outputs is None:
            self._outputs = torch.cat([self.run(rows) for rows in self.batches()])
        return self._outputs

    def changed(self) -> None:
        """Forget ``outputs``: the layer's weights are others now."""
        self._outputs = None

    def observe(self, names: Sequence[str], observer: Observer) -> None:
        """Call ``observer(name, inputs)`` with the inputs ``(tokens, columns)`` of modules, batch by batch.

        A pass ends as soon as all ``names`` have been seen in it.
        """
        modules = dict(self.layer.named_modules())
        seen: set[str] = set()

        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                observer(name, args[0].detach().flatten(0, -2))
                seen.add(name)
                if len(seen) == len(names):
                    raise _Seen

            return see

        handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
        try:
            for rows in self.batches():
                seen.clear()
                try:
                    self.run(rows)
                except _Seen:
                    continue
        finally:
            for handle in handles:
                handle.remove()

    def observe_all(self, observer: Observer) -> list[list[str]]:
        """Call ``observer(name, inputs)`` for the linears, once for those that share their input.

        Returns:
            The linears in the order in which they run, those that share their input together; the first of
            each group is the name that the observer got.
        """
        linears = self.linears
        groups: list[list[str]] = []
        seen: list[tuple[Tensor, list[str]]] = []  # of one batch: each input with the names that it reached
        count = 0

        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                nonlocal count
                count += 1
                for tensor, names in seen:
                    if tensor is args[0]:
                        names.append(name)
                        break
                else:
                    seen.append((args[0], [name]))
                    observer(name, args[0].detach().flatten(0, -2))
                if count == len(linears):
                    raise _Seen

            return see

        handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
        try:
            for rows in self.batches():
                with suppress(_Seen):
                    self.run(rows)
                groups = [names for _, names in seen]
                seen.clear()
                count = 0
        finally:
            for handle in handles:
                handle.remove()
        return groups


@torch.no_grad()
def walk(
    decoder: Decoder,
    ids: Tensor,
    *,
    dtype: torch.dtype | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[Step]:
    """Give each decoder layer in turn; what it computes after the caller's changes is the next one's input.

    Args:
        ids: ``(rows, length)`` token ids without padding.
        dtype: what a layer read from files is computed in; one in memory keeps its own.
        batch_tokens: tokens of one forward pass.
    """
    where = decoder.model.get_input_embeddings().weight.device
    ids = ids.to(where)
    batch_rows = max(1, batch_tokens // ids.shape[1])
    hidden, arguments = _record(decoder, ids, batch_rows)
    for index, layer in enumerate(decoder.layers):
        name = f"{decoder.prefix}.{index}"
        if decoder.weights is not None:
            decoder.weights.fill(layer, name, dtype or hidden.dtype, where)
        step = Step(index, name, layer, hidden, arguments[index], batch_rows)
        yield step
        if step._outputs is not None:
            hidden = step._outputs
        elif index + 1 < len(decoder.layers):
            for rows in step.batches():
                hidden[rows] = step.run(rows)
        if decoder.weights is not None:
            layer.to("meta")


def _record(decoder: Decoder, ids: Tensor, batch_rows: int) -> tuple[Tensor, list[dict[int, Any]]]:
    """What reaches the first layer, and what each layer is called with besides, by the rows of a batch.

    The layers are passed over: each hands its input on, and notes its other arguments (masks, rotary
    embeddings), which may differ from layer to layer and do not depend on the hidden states.
    """
    sizes = {min(batch_rows, len(ids)), len(ids) % batch_rows or batch_rows}
    arguments: list[dict[int, Any]] = [{} for _ in decoder.layers]
    hidden: list[Tensor] = []

    def recorder(index: int, as_tuple: bool) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                hidden.append(hidden_states)
            elif hidden_states.shape != hidden[-1].shape:
                raise _Seen
            if len(hidden_states) in sizes:
                arguments[index].setdefault(len(hidden_states), (args, kwargs))
            return (hidden_states,) if as_tuple else hidden_states

        return forward

    for as_tuple in (False, True):
        hidden.clear()
        for entry in arguments:
            entry.clear()
        try:
            for index, layer in enumerate(decoder.layers):
                layer.forward = recorder(index, as_tuple)
            base = getattr(decoder.model, decoder.model.base_model_prefix)
            for start in range(0, len(ids), batch_rows):
                base(input_ids=ids[start : start + batch_rows], use_cache=False)
            break
        except (_Seen, AttributeError, ValueError):
            if as_tuple:
                raise
        finally:
            for layer in decoder.layers:
                del layer.forward
    return torch.cat(hidden), arguments
