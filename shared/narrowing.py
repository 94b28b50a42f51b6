"""A smaller model made of a larger one's weights: fewer layers, or narrower ones.

The weights that stay are sliced out and loaded into a fresh model of the smaller config, so that layer
indices (which the key-value cache goes by) and tied weights are right by construction.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor  # isort: skip

from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.importance import Importance
from tuneutils.shared.layerwise import decoder_of


@dataclass(frozen=True)
class Shape:
    """How large a student is; None keeps the teacher's size.

    Attributes:
        kv_heads: key and value heads; each keeps its query heads.
    """

    layers: tuple[int, ...] | None = None
    hidden: int | None = None
    intermediate: int | None = None
    kv_heads: int | None = None

    @property
    def narrows(self) -> bool:
        return any(size is not None for size in (self.hidden, self.intermediate, self.kv_heads))


def parse_layers(text: str, count: int) -> tuple[int, ...]:
    """``"0-3,8"`` as ``(0, 1, 2, 3, 8)``.

    Raises:
        ToolError: exit 2: not such a list, not ascending, or beyond the teacher's ``count`` layers.
    """
    made: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ToolError(f"layers {text!r}: {part!r} is no layer or range", code=ExitCode.USAGE)
        first, last = int(match[1]), int(match[2] or match[1])
        made += range(first, last + 1)
    if not made or any(a >= b for a, b in pairwise(made)) or made[-1] >= count:
        raise ToolError(f"layers {text!r}: must ascend, from 0 to {count - 1} at most", code=ExitCode.USAGE)
    return tuple(made)


def uniform_layers(count: int, keep: int) -> tuple[int, ...]:
    """``keep`` of ``count`` layers, evenly spaced, the first and the last among them."""
    if keep == 1:
        return (0,)
    return tuple(round(i * (count - 1) / (keep - 1)) for i in range(keep))


def influential_layers(influence: Tensor, keep: int) -> tuple[int, ...]:
    """The ``keep`` layers of highest block influence, in their order; of equals the earlier stays."""
    order = torch.argsort(influence, descending=True, stable=True)[:keep]
    return tuple(sorted(order.tolist()))


def matched_layers(kept: tuple[int, ...] | None, student: int, teacher: int) -> list[int]:
    """For each student layer, the teacher layer after which the two should hold the same.

    A cut student's layer stands for its own and the removed ones up to the next that is kept; of a given
    student's layers each takes its share.
    """
    if kept is None:
        return [-(-(i + 1) * teacher // student) - 1 for i in range(student)]
    return [following - 1 for following in (*kept[1:], teacher)]


def check_sizes(config: Any, shape: Shape) -> None:
    """Refuse a student that is larger than its teacher in any way.

    Raises:
        ToolError: exit 2.
    """
    text = config.get_text_config()
    limits = (
        ("hidden size", shape.hidden, text.hidden_size),
        ("intermediate size", shape.intermediate, getattr(text, "intermediate_size", None)),
        ("key and value heads", shape.kv_heads, getattr(text, "num_key_value_heads", None)),
        ("layers", len(shape.layers) if shape.layers is not None else None, text.num_hidden_layers),
    )
    for name, wanted, there in limits:
        if wanted is None:
            continue
        if there is None:
            raise ToolError(f"{name}: a {text.model_type} config has no such entry", code=ExitCode.USAGE)
        if wanted > there:
            raise ToolError(f"{wanted} {name}: the teacher has {there}", code=ExitCode.USAGE)


def student_config(config: Any, shape: Shape) -> Any:
    """The teacher's config with the student's sizes; a list with an entry a layer keeps those that stay."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    if shape.layers is not None:
        count = text.num_hidden_layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(text, name, [value[i] for i in shape.layers])
        text.num_hidden_layers = len(shape.layers)
    if shape.narrows:
        text.head_dim = head_dim(config)  # else it would follow from the new width
    if shape.hidden is not None:
        text.hidden_size = shape.hidden
    if shape.intermediate is not None:
        text.intermediate_size = shape.intermediate
    if shape.kv_heads is not None:
        text.num_attention_heads = text.num_attention_heads // text.num_key_value_heads * shape.kv_heads
        text.num_key_value_heads = shape.kv_heads
    return made


def head_dim(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def make_student(teacher: Any, shape: Shape, importance: Importance | None) -> Any:
    """A model of ``shape`` with the teacher's weights, in float32.

    Args:
        importance: of the teacher's channels and heads, when the student is narrower.

    Raises:
        ToolError: the teacher has weights that narrowing knows no rule for.
    """
    from transformers import AutoModelForCausalLM

    prefix = decoder_of(teacher).prefix
    count = teacher.config.get_text_config().num_hidden_layers
    layers = shape.layers if shape.layers is not None else tuple(range(count))
    numbers = {old: new for new, old in enumerate(layers)}
    kept = _Kept(teacher.config, shape, importance)
    weights: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        match = re.fullmatch(re.escape(prefix) + r"\.(\d+)\.(.+)", name)
        if match is None:
            weights[name] = kept.slice(name, tensor, None)
        elif int(match[1]) in numbers:
            index = int(match[1])
            weights[f"{prefix}.{numbers[index]}.{match[2]}"] = kept.slice(match[2], tensor, index)
    with torch.random.fork_rng():
        student = AutoModelForCausalLM.from_config(student_config(teacher.config, shape), dtype=torch.float32)
    try:
        student.load_state_dict({n: t.float() for n, t in weights.items()})
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:300]
        raise ToolError(f"a {type(teacher).__name__} cannot be cut so: {reason}") from exc
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def _best(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` highest scores, ascending; of equals the earlier stays."""
    return torch.argsort(scores, descending=True, stable=True)[:keep].sort().values


class _Kept:
    """Which channels and heads stay, and what that means for each weight by its name."""

    def __init__(self, config: Any, shape: Shape, importance: Importance | None) -> None:
        self.narrows = shape.narrows
        if not shape.narrows:
            return
        assert importance is not None
        text = config.get_text_config()
        self.norm_plus_one = "gemma" in text.model_type  # its norms multiply by 1 + weight
        count, dim = text.num_hidden_layers, head_dim(config)
        groups = text.num_key_value_heads
        group_rows = text.num_attention_heads // groups * dim
        self.hidden = _best(importance.hidden, shape.hidden or text.hidden_size)
        self.mlp = [
            _best(importance.mlp[i], shape.intermediate or text.intermediate_size) for i in range(count)
        ]
        chosen = [_best(importance.groups[i], shape.kv_heads or groups) for i in range(count)]
        self.query = [_rows(c, group_rows) for c in chosen]
        self.key = [_rows(c, dim) for c in chosen]

    def slice(self, name: str, tensor: Tensor, layer: int | None) -> Tensor:
        """What stays of a weight; ``name`` is within its layer, or the full one outside the layers."""
        if not self.narrows:
            return tensor
        module, _, kind = name.rpartition(".")
        module = module.rsplit(".", 1)[-1]
        outputs, inputs = self._kept_of(module, layer)
        if outputs is self.hidden and inputs is None:
            tensor = self._rescaled(tensor)
        if outputs is None and inputs is None and module not in ("q_norm", "k_norm"):
            raise ToolError(f"narrowing knows no rule for {name}; cut layers instead")
        if outputs is not None:
            tensor = tensor.index_select(0, outputs.to(tensor.device))
        if inputs is not None and kind == "weight":
            tensor = tensor.index_select(1, inputs.to(tensor.device))
        return tensor

    def _rescaled(self, norm: Tensor) -> Tensor:
        """A norm's weight times sqrt(H / H'): dropping channels that hold nothing then changes nothing.

        The mean square over the H' channels that stay is H / H' times that over all.
        """
        factor = (len(norm) / len(self.hidden)) ** 0.5
        scaled: Tensor = (norm + 1) * factor - 1 if self.norm_plus_one else norm * factor
        return scaled

    def _kept_of(self, module: str, layer: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Kept outputs and inputs of a module."""
        if module in ("embed_tokens", "lm_head"):
            return None, self.hidden
        if module == "norm" or module.endswith("layernorm"):
            return self.hidden, None
        if layer is None:
            return None, None
        rules: dict[str, tuple[Tensor, Tensor]] = {
            "q_proj": (self.query[layer], self.hidden),
            "k_proj": (self.key[layer], self.hidden),
            "v_proj": (self.key[layer], self.hidden),
            "o_proj": (self.hidden, self.query[layer]),
            "gate_proj": (self.mlp[layer], self.hidden),
            "up_proj": (self.mlp[layer], self.hidden),
            "down_proj": (self.hidden, self.mlp[layer]),
        }
        return rules.get(module, (None, None))


def _rows(groups: Tensor, size: int) -> Tensor:
    """Row indices of whole groups of ``size`` rows."""
    rows: Tensor = groups[:, None] * size + torch.arange(size, device=groups.device)
    return rows.flatten()
