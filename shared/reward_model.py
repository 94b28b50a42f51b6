"""A reward model: a decoder with a linear head of one output, read at the EOS that closes a text.

Row 6 of the N+ details (Huang et al. 2024, arXiv 2403.17031): the head starts from a normal distribution
of standard deviation 1/√(d + 1), without a bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from safetensors import SafetensorError
from torch import Tensor, nn

from tuneutils.shared.device import resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import ModelRef, load_adapter, load_tokenizer, resolve

#: Keys of ``artifact.json``.
NORMALISATION = "reward_normalisation"
TEXT = "reward_text"


class Head(nn.Linear):
    """The linear head, in float32 whatever the decoder computes in: differences of scores are small."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float())


def start_head(head: nn.Linear, seed: int) -> None:
    """Row 6: weights from N(0, 1/(d + 1))."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(head.weight.shape).normal_(
        0, 1 / math.sqrt(head.in_features + 1), generator=generator
    )
    with torch.no_grad():
        head.weight.copy_(drawn)


def load_classifier(
    ref: ModelRef,
    where: torch.device,
    dtype: torch.dtype,
    pad_id: int,
    *,
    new_head_seed: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A sequence classifier with one label, dropout off, its head in float32.

    Args:
        new_head_seed: start a head where the model has none; None refuses such a model.

    Raises:
        ToolError: no decoder that can have such a head (65), or GGUF (2).
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    if ref.kind == "gguf":
        raise ToolError(f"{ref.given}: a GGUF file; import it first (model-import)", code=ExitCode.USAGE)
    given = {"revision": ref.revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(ref.path, **given)
        classifier = next(iter(config.architectures or ()), "").endswith("ForSequenceClassification")
        if classifier and config.num_labels != 1:
            raise ValueError(f"{config.architectures[0]} with {config.num_labels} labels, not one")
        without_dropout(config)
        config.num_labels = 1
        config.get_text_config().pad_token_id = pad_id
        model, info = AutoModelForSequenceClassification.from_pretrained(
            ref.path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **given
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as exc:
        raise ToolError(f"{ref.given}: no reward model: {' '.join(str(exc).split())[:300]}") from exc
    plain = getattr(model, "score", None)
    decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(plain, nn.Linear) or plain.bias is not None or decoder is None:
        raise ToolError(f"{ref.given}: {type(model).__name__} has no linear head named score over a decoder")
    missing = set(info["missing_keys"])
    if missing - {"score.weight"} or (missing and new_head_seed is None):
        raise ToolError(f"{ref.given}: {sorted(missing)[0]} is not in its files; train one with rm-train")
    model.score = Head(plain.in_features, 1, bias=False)
    if missing:
        start_head(model.score, int(new_head_seed or 0))
    else:
        model.score.load_state_dict(plain.state_dict())
    model.config.use_cache = False
    return model.eval().to(where)


def load_scorer(
    ref: ModelRef, where: torch.device, dtype: torch.dtype, pad_id: int, *, trust_remote_code: bool = False
) -> Any:
    """A trained reward model: a sequence classifier, or a PEFT model of one, in evaluation mode.

    Raises:
        ToolError: exit 65: it is none; 66: it is not there.
    """
    is_adapter = ref.kind == "adapter"
    model = load_classifier(
        ref.root,
        where,
        dtype,
        pad_id,
        new_head_seed=0 if is_adapter else None,  # an adapter brings the head along
        trust_remote_code=trust_remote_code,
    )
    if is_adapter:
        model = load_adapter(model, ref.path).eval()
        if "score" not in (model.peft_config["default"].modules_to_save or ()):
            raise ToolError(f"{ref.given}: an adapter without a score head; train one with rm-train")
    return model


def without_dropout(config: Any) -> None:
    """Row 10: chosen and rejected must be scored by one and the same network."""
    inner = config.get_text_config()
    for part in (config, inner):
        for name, value in list(vars(part).items()):
            if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(part, name, 0.0)


@dataclass
class RewardModel:
    """A scorer of token sequences.

    Attributes:
        model: a sequence classifier with one label, or a PEFT model of one.
        mean, std: of the normalisation.
        template, max_length: how it was trained to read texts.
    """

    model: Any
    tokenizer: Any
    where: torch.device
    dtype: torch.dtype
    mean: float = 0.0
    std: float = 1.0
    template: str = "auto"
    max_length: int = 1024

    @torch.no_grad()
    def scores(self, rows: Sequence[Sequence[int]], batch_size: int, *, raw: bool = False) -> list[float]:
        """Scores of texts as token ids, each closed by EOS, in their order."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        made = [0.0] * len(rows)
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            ids = padded([rows[i] for i in at], self.tokenizer.pad_token_id).to(self.where)
            with self.autocast():
                found = read_out(self.model, ids).float().tolist()
            for i, score in zip(at, found, strict=True):
                made[i] = score if raw else (score - self.mean) / self.std
        self.model.train(was_training)
        return made

    def autocast(self) -> AbstractContextManager[Any]:
        """Weights trained in full are float32, and multiplied in the precision asked for."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.where.type, dtype=self.dtype)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """``(n, T)``, padded on the right, where a causal model never looks."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])


def read_out(model: Any, ids: Tensor) -> Tensor:
    """Scores ``(n,)`` at each row's last token that is no padding.

    No attention mask is needed with padding on the right, and attention then takes its causal kernels.
    """
    made: Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
    return made


def load_reward_model(
    given: str,
    device_name: str = "auto",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> RewardModel:
    """An artifact of ``rm-train``, or any sequence classifier with one label and a head named ``score``.

    Raises:
        ToolError: exit 65: it is none; 66: it is not there.
    """
    ref = resolve(given)
    where = resolve_device(device_name)
    precision = resolve_dtype(dtype, where)
    tokenizer = load_tokenizer(ref, trust_remote_code=trust_remote_code)
    pad_id = int(tokenizer.pad_token_id)
    model = load_scorer(ref, where, precision, pad_id, trust_remote_code=trust_remote_code)
    mean, std = normalisation(ref)
    text = ref.manifest.get(TEXT) or {}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return RewardModel(
        model,
        tokenizer,
        where,
        precision,
        mean,
        std,
        template=str(text.get("template", "auto")),
        max_length=min(int(text.get("max_length", context)), context),
    )


def normalisation(ref: ModelRef) -> tuple[float, float]:
    """Mean and standard deviation of the artifact's normalisation; 0 and 1 where it has none."""
    found = ref.manifest.get(NORMALISATION) or {}
    mean, std = float(found.get("mean", 0.0)), float(found.get("std", 1.0))
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ToolError(f"{ref.given}: its {NORMALISATION} has mean {mean} and std {std}; train it again")
    return mean, std
