"""Whether a reward model reads prompts in the form in which it was taught."""

from __future__ import annotations

from typing import Any

from tuneutils.shared.errors import ToolError
from tuneutils.shared.models import resolve
from tuneutils.shared.reward_model import TEXT


def check_same_template(given: str, template: str, tokenizer: Any) -> None:
    """Refuse a reward model that was trained with another template than the policy's prompts get.

    Args:
        given: the reward model; one without ``reward_text`` in its manifest is taken as it is.
        template: ``auto``, ``chat`` or ``none``, of this run.

    Raises:
        ToolError: exit 65, with the option to give.
    """
    taught = (resolve(given).manifest.get(TEXT) or {}).get("template")
    if taught is None:
        return

    def chats(name: str) -> bool:
        return name == "chat" or (name == "auto" and bool(tokenizer.chat_template))

    if chats(taught) != chats(template):
        raise ToolError(
            f"{given}: was trained with --template {taught}, and the prompts here get --template {template}; "
            f"give --template {taught}, or train it with --template {template}"
        )
