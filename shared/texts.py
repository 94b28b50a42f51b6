"""From records to token ids of a prompt with its completion: one EOS closes it, nothing comes after.

Prompt and completion are tokenized as for fine-tuning (``shared.supervise``), so that what is scored or
preferred is, token for token, what a policy is given and answers. A reward model is read at the EOS.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import IGNORE, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How Bai et al. 2022 (arXiv 2204.05862) write a dialogue in one string.
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Text:
    """A prompt with a completion.

    Attributes:
        ids: ends in EOS.
        prompt: tokens of the prompt; ``completion`` of what follows, the closing EOS left out.
    """

    ids: list[int]
    prompt: int

    @property
    def completion(self) -> int:
        return len(self.ids) - self.prompt - 1


def encode_text(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, template: str = "auto"
) -> Text:
    """Tokenize one completion of a prompt.

    Args:
        prompt, completion: strings, or lists of messages.
        template: see ``supervise.encode``.

    Raises:
        ValueError: it cannot be encoded; the caller places it.
    """
    return _closed({"prompt": prompt, "completion": completion}, tokenizer, template)


def encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> Text:
    """Tokenize a ``prompt``+``completion`` or ``messages`` record, of which the last answer is scored."""
    if "completion" in record:
        return encode_text(record["prompt"], record["completion"], tokenizer, template)
    return _closed({"messages": record["messages"]}, tokenizer, template)


def _closed(record: Record, tokenizer: PreTrainedTokenizerBase, template: str) -> Text:
    encoded = encode(record, tokenizer, learn="last", template=template)
    learnt = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    if not learnt:
        raise ValueError("its last turn is no answer to score")
    ids = encoded.input_ids[: learnt[-1] + 1]  # a template may write more after its EOS
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(int(tokenizer.eos_token_id))
    return Text(ids, learnt[0])


def shortened(text: Text, limit: int) -> Text:
    """The text without the start of its prompt, so that ``limit`` tokens are left.

    Raises:
        ValueError: the completion alone is longer.
    """
    over = len(text.ids) - limit
    if over <= 0:
        return text
    if over > text.prompt:
        raise ValueError(f"the completion alone has {len(text.ids) - text.prompt} tokens, more than {limit}")
    return Text(text.ids[over:], text.prompt - over)


def split_implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a pair whose two sides repeat the prompt.

    Messages, and dialogues written in one string (``\\n\\nHuman: …\\n\\nAssistant: …``), differ in their last
    turn; other strings share their prompt up to the last space before they part.

    Raises:
        ValueError: they differ before the last turn.
    """
    sides = [_turns(side) if isinstance(side, str) else side for side in (chosen, rejected)]
    if all(isinstance(side, list) for side in sides):
        heads = [side[:-1] for side in sides]
        if heads[0] != heads[1] or not heads[0]:
            raise ValueError("chosen and rejected differ before their last turn, so they have no one prompt")
        return heads[0], sides[0][-1:], sides[1][-1:]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError("chosen and rejected are not both strings or both messages")
    parts = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    shared = next(parts, min(len(chosen), len(rejected)))
    cut = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared)) + 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _turns(text: str) -> list[dict[str, str]] | str:
    """A dialogue in one string as messages; any other string as it is."""
    parts = TURN.split(text)
    if parts[0].strip() or len(parts) < 5:
        return text
    said = [{"role": ROLES[who], "content": what.strip()} for who, what in zip(parts[1::2], parts[2::2])]
    return said if said[-1]["role"] == "assistant" else text
