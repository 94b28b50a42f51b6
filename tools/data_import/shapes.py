"""Known row shapes (Alpaca, ShareGPT, OpenAI, pairs) mapped to the formats of ``shared.records``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tuneutils.shared.errors import nearest
from tuneutils.shared.records import FORMATS, Record, format_of
from tuneutils.tools.data_import.testsets import TEST_SET, test_set_of

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}
#: Two-field shapes: (prompt, completion), the first that a row has.
PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
LABELS = {"true": True, "false": False, "1": True, "0": False}


def to_record(row: Record, wanted: str) -> Record:
    """The row as a record of the format ``wanted`` (``auto``: of the format that its shape suggests).

    Raises:
        ValueError: its fields fit no known shape, or cannot be turned into the format.
    """
    if wanted in ("auto", TEST_SET) and test_set_of(row):
        return {k: v for k, v in row.items() if k and not str(k).startswith("Unnamed")}
    for shape in (_conversation, _alpaca, _standard, _multiple_choice, _pair):
        record = shape(row)
        if record is not None:
            return record if wanted == "auto" else _convert(record, wanted)
    raise ValueError(
        f"no known shape: {', '.join(sorted(map(str, row))) or 'no fields'}; use --map TARGET=FIELD"
    )


def mapped(row: Record, mapping: Sequence[tuple[str, str]]) -> Record:
    """The row with its fields renamed: every target taken from its source field; the others stay.

    Raises:
        ValueError: a source field is absent.
    """
    used = {source.split(".")[0] for _, source in mapping}
    out = {k: v for k, v in row.items() if k not in used}
    for target, source in mapping:
        value: Any = row
        for key in source.split("."):
            if not isinstance(value, dict) or key not in value:
                hint = nearest(key, map(str, value)) if isinstance(value, dict) else ""
                raise ValueError(f"field {source!r}: absent{hint}")
            value = value[key]
        out[target] = value
    return out


def _standard(row: Record) -> Record | None:
    """A row that already is a record; message contents in parts become strings."""
    if "messages" in row and "label" in row and "completion" not in row:
        return _labelled(_messages(row["messages"]), row["label"])
    found = format_of(row)
    if found is None or (found == "prompt" and _has_pair(row)):
        return None
    record = {name: row[name] for name in FORMATS[found]}
    for name, value in record.items():
        if isinstance(value, list) and name != "label":
            record[name] = _messages(value)
    if "label" in record:
        record["label"] = _label(record["label"])
    if found == "parallel" and "score" in row:
        record["score"] = row["score"]
    return record


def _alpaca(row: Record) -> Record | None:
    """Stanford Alpaca: input below instruction; with ``system`` or ``history``, a conversation."""
    if "instruction" not in row or not {"output", "chosen"} & set(row):
        return None
    prompt: Any = _joined(row.get("instruction"), row.get("input"))
    if row.get("system") or row.get("history"):
        turns = [("system", row.get("system"))]
        for asked, answered in row.get("history") or ():
            turns += [("user", asked), ("assistant", answered)]
        prompt = [_message(role, text) for role, text in [*turns, ("user", prompt)] if text]
    chat = isinstance(prompt, list)
    if "chosen" in row and "rejected" in row:
        sides = {side: _answer(row[side], chat) for side in ("chosen", "rejected")}
        return {"prompt": prompt, **sides}
    if "output" not in row:
        return None
    if chat:
        return {"messages": [*prompt, _message("assistant", row["output"])]}
    record = {"prompt": prompt, "completion": row["output"]}
    label = row.get("kto_tag")
    return {**record, "label": _label(label)} if label is not None else record


def _conversation(row: Record) -> Record | None:
    """ShareGPT: ``conversations``; with chosen/rejected a preference, with a label unpaired."""
    if "conversations" not in row:
        return None
    messages = _messages(row["conversations"])
    if row.get("system"):
        messages = [_message("system", row["system"]), *messages]
    if "chosen" in row and "rejected" in row:
        sides = {side: _answer(row[side], True) for side in ("chosen", "rejected")}
        return {"prompt": messages, **sides}
    label = row.get("label", row.get("kto_tag"))
    return _labelled(messages, label) if label is not None else {"messages": messages}


def _multiple_choice(row: Record) -> Record | None:
    """``question``, ``options`` in lettered lines, ``answer`` one of them: right over wrong."""
    if not {"question", "options", "answer"} <= set(row) or not isinstance(row["options"], str):
        return None
    options = [o.strip() for o in re.split(r"(?m)^(?=[A-Z][.)] )", row["options"]) if o.strip()]
    answer = str(row["answer"]).strip()
    wrong = [o for o in options if o != answer]
    if len(options) != 2 or len(wrong) != 1:
        return None
    return {"prompt": row["question"], "chosen": _unlettered(answer), "rejected": _unlettered(wrong[0])}


def _pair(row: Record) -> Record | None:
    for prompt, completion in PAIRS:
        if prompt in row and completion in row:
            return {"prompt": row[prompt], "completion": row[completion]}
    return None


def _has_pair(row: Record) -> bool:
    return any(p in row and c in row for p, c in PAIRS)


def _convert(record: Record, wanted: str) -> Record:
    """A record in another format, where nothing has to be made up for it."""
    found = format_of(record)
    if found == wanted or (wanted == "preference" and found == "implicit-preference"):
        return record
    convert = CONVERSIONS.get((str(found), wanted))
    if convert is None:
        raise ValueError(f"is {found}, which cannot become {wanted}; name the fields with --map")
    return convert(record)


def _as_messages(record: Record) -> Record:
    prompt, completion = record["prompt"], record["completion"]
    turns = prompt if isinstance(prompt, list) else [_message("user", prompt)]
    answer = completion if isinstance(completion, list) else [_message("assistant", completion)]
    return {"messages": [*turns, *answer]}


def _as_prompt_completion(record: Record) -> Record:
    messages = record["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("field 'messages': does not end in an assistant's turn after another")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _chosen_only(record: Record) -> Record:
    return {"prompt": record["prompt"], "completion": record["chosen"]}


def _without_label(record: Record) -> Record:
    if record["label"] is False:
        raise ValueError("field 'label': a bad answer is nothing to learn from")
    return {"prompt": record["prompt"], "completion": record["completion"]}


CONVERSIONS: dict[tuple[str, str], Callable[[Record], Record]] = {
    ("prompt-completion", "messages"): _as_messages,
    ("messages", "prompt-completion"): _as_prompt_completion,
    ("preference", "prompt-completion"): _chosen_only,
    ("preference", "messages"): lambda r: _as_messages(_chosen_only(r)),
    ("unpaired", "prompt-completion"): _without_label,
    ("unpaired", "messages"): lambda r: _as_messages(_without_label(r)),
}


def _messages(value: Any) -> list[Record]:
    """OpenAI or ShareGPT turns as ``{"role", "content"}`` with text contents.

    Raises:
        ValueError: a turn is neither, has an unknown role, or holds something other than text.
    """
    if not isinstance(value, list):
        raise ValueError("field 'messages': must be a list")
    out = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise ValueError(f"field messages[{i}]: must be an object")
        role = turn.get("role", turn.get("from"))
        if role not in ROLES:
            raise ValueError(f"field messages[{i}].role: unknown role {role!r}")
        out.append(_message(ROLES[role], _content(turn.get("content", turn.get("value")), i)))
    return out


def _content(value: Any, i: int) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"field messages[{i}].content: must be text")
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"field messages[{i}].content: a part of kind {kind!r} is no text")
        parts.append(str(part.get("text", part.get("value", ""))))
    return "".join(parts)


def _labelled(messages: list[Record], label: Any) -> Record:
    return {**_as_prompt_completion({"messages": messages}), "label": _label(label)}


def _label(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in LABELS:
        return LABELS[value.strip().lower()]
    if isinstance(value, (bool, int)) and value in (0, 1):
        return bool(value)
    raise ValueError(f"field 'label': must be true or false, is {value!r}")


def _answer(value: Any, chat: bool) -> Any:
    """A chosen or rejected answer, as a turn in a conversation or as text."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        turns = _messages(value)
        return turns if chat else "".join(t["content"] for t in turns)
    return [_message("assistant", value)] if chat else value


def _message(role: str, content: Any) -> Record:
    return {"role": role, "content": content}


def _joined(instruction: Any, extra: Any) -> Any:
    return f"{instruction}\n\n{extra}" if isinstance(extra, str) and extra.strip() else instruction


def _unlettered(option: str) -> str:
    return re.sub(r"^[A-Z][.)] ", "", option).strip()
