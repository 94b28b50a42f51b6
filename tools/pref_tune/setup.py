"""Policy, judge and precision as alignment needs them."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import resolve


def check_judge(params: Any, tokenizer: Any) -> None:
    """Refuse a reward model that reads prompts in another form than the policy.

    Raises:
        ToolError: exit 65, with the option to give.
    """
    if params.reward_model is None:
        return
    taught = (resolve(params.reward_model).manifest.get("reward_text") or {}).get("template")
    if taught is None:
        return

    def chats(name: str) -> bool:
        return name == "chat" or (name == "auto" and bool(tokenizer.chat_template))

    if chats(taught) != chats(params.template):
        raise ToolError(
            f"{params.reward_model}: was trained with --template {taught}, and the prompts here get "
            f"--template {params.template}; give --template {taught}, or train it with --template "
            f"{params.template}"
        )


def autocast(model: Any, where: Any, dtype: Any) -> Any:
    """Weights stored in float32 are multiplied in the precision asked for, as in training."""
    import torch

    stored = next(model.parameters()).dtype
    return torch.autocast(where.type, dtype=dtype, enabled=stored == torch.float32 and dtype != stored)


def without_dropout(model: Any) -> None:
    """Policy and reference must be one network at the start, and each side of a pair see the same."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
