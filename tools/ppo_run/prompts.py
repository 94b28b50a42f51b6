"""Prompts as token ids, each with the text that a reward sees and the place it came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuneutils.shared.artifact import Input, describe_input, work_dir
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.records import Located, Reader, Record, dump_line
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


@dataclass
class Source:
    """A stream of prompts, hashed but not yet read; stdin is read at once, since it can be read only once."""

    reader: Reader
    inputs: list[Input]
    located: list[Located] | None = None


def open_source(run: Run[Params], paths: Sequence[str], role: str) -> Source:
    """Hash the streams of one role.

    Raises:
        ToolError: no such file (66), or stdin shared by several processes (2).
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if "-" in paths and world > 1:
        raise ToolError(
            "several processes cannot share stdin; give the prompts as a file", code=ExitCode.USAGE
        )
    quarantine = None
    if run.on_error == "quarantine" and run.output is not None:
        quarantine = work_dir(run.output) / f"{role}.quarantine.jsonl" if not rank else os.devnull
    reader = Reader(paths, formats=FORMATS, on_error=run.on_error, quarantine=quarantine)
    source = Source(reader, [describe_input(role, path) for path in paths if path != "-"])
    if "-" in paths:
        source.located = list(reader.located())
        lines = b"".join(dump_line(x.record) for x in source.located if x.path in ("-", "<stdin>"))
        source.inputs.append(Input(role, "-", hashlib.sha256(lines).hexdigest()))
    return source


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
    for item in source.reader.located() if source.located is None else source.located:
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
