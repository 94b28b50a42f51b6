"""Prompts as token ids, each with the text that a reward sees and the place it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source
from tuneutils.shared.records import Record
from tuneutils.shared.supervise import prompt_ids
from tuneutils.tools.ppo_run.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("prompt", "prompt-completion", "preference", "unpaired", "messages")


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, its text as a reward sees it, and its ``file:line``."""

    ids: tuple[int, ...]
    text: str
    place: str


def read_prompts(
    run: Run[Params], source: Source, tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[Prompt]:
    """The prompts of a stream.

    Args:
        context: the longest sequence, in tokens, that policy and reward model take.

    Raises:
        ToolError: exit 65 with file and line of a prompt that is empty or leaves no room for a response.
    """
    params = run.params
    made: list[Prompt] = []
    dropped = 0
    for item in source.located:
        try:
            ids = prompt_ids(item.record, tokenizer, template=params.template)
            if not ids:
                raise ValueError("field 'prompt': has no tokens")
            if context is not None and len(ids) + params.max_new_tokens > context:
                if params.too_long == "drop":
                    dropped += 1
                    continue
                raise ValueError(
                    f"the prompt's {len(ids)} tokens and --max-new-tokens {params.max_new_tokens} exceed the "
                    f"context of {context} (--too-long drop leaves such prompts out)"
                )
        except ValueError as exc:
            source.reader.refuse(item, str(exc))
            continue
        made.append(Prompt(tuple(ids), text_of(item.record), item.place))
    if not made:
        raise ToolError(f"no prompt left ({source.reader.stats.refused} refused, {dropped} too long)")
    for count, what in ((source.reader.stats.refused, "bad records"), (dropped, "prompts too long")):
        if count:
            run.log.warning("%d %s left out", count, what)
    return made


def text_of(record: Record) -> str:
    """What a reward is told of a prompt: its string, or what the last user said."""
    prompt: Any = record.get("prompt", record.get("messages"))
    if isinstance(prompt, str):
        return prompt
    asked = [str(m["content"]) for m in prompt if m["role"] == "user"]
    return asked[-1] if asked else str(prompt[0]["content"])
