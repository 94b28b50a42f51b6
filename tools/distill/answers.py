"""Sequence-level distillation: the teacher writes what is learnt (Kim and Rush 2016, arXiv 1606.07947)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.records import dump_line, format_of, read, write
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.streams import Record
from tuneutils.shared.supervise import prompt_ids

BATCH = 16


def teacher_records(
    folder: Path,
    identity: str,
    model: Callable[[], Any],
    tokenizer: Any,
    records: Sequence[Record],
    sampling: Sampling,
    *,
    prompt_tokens: int,
    template: str,
    progress: Callable[[int], None] | None = None,
) -> list[Record]:
    """The records with their last answers, or all but their first tokens, written by the teacher.

    What is written is kept in ``folder`` under the hash of all that decides it, so that a killed run, or
    the next one, reads it.

    Args:
        identity: of the teacher.
        prompt_tokens: of a plain text, how many of the teacher's tokens it goes on from.

    Raises:
        ValueError: a record has no prompt.
    """
    decides = [identity, repr(sampling), str(prompt_tokens), template, *map(str, map(dump_line, records))]
    name = hashlib.sha256("\0".join(decides).encode()).hexdigest()[:32]
    path = folder / f"{name}.jsonl"
    if path.is_file():
        return read(path)
    prompts = [_prompt(r, tokenizer, prompt_tokens, template) for r in records]
    loaded = model()
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        rows = range(start, min(start + BATCH, len(prompts)))
        made = generate(
            loaded,
            [prompts[i] for i in rows],
            sampling,
            batch_size=BATCH,
            pad_token_id=tokenizer.pad_token_id,
            row_ids=list(rows),
        )
        answers += [tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in made]
        if progress is not None:
            progress(len(rows))
    written = [
        _answered(record, prompt, answer, tokenizer)
        for record, prompt, answer in zip(records, prompts, answers, strict=True)
        if answer.strip()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.jsonl"
    write(temporary, written)
    os.replace(temporary, path)
    return written


def _prompt(record: Record, tokenizer: Any, prompt_tokens: int, template: str) -> list[int]:
    if format_of(record) == "text":
        return list(tokenizer(record["text"]).input_ids[:prompt_tokens])
    return prompt_ids(record, tokenizer, template=template)


def _answered(record: Record, prompt: Sequence[int], answer: str, tokenizer: Any) -> Record:
    if format_of(record) == "text":
        return {**record, "text": tokenizer.decode(prompt, skip_special_tokens=True) + answer}
    turn = {"role": "assistant", "content": answer}
    if "messages" in record:
        last = max(i for i, m in enumerate(record["messages"]) if m["role"] == "assistant")
        return {**record, "messages": [*record["messages"][:last], turn]}
    return {**record, "completion": [turn] if isinstance(record.get("completion"), list) else answer}
