"""Greedy answers, and what can be checked of them without a judge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.command import Run
from tuneutils.shared.evaluate import distinct_n
from tuneutils.shared.models import Loaded
from tuneutils.shared.records import BadRecord, Located, Record
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.supervise import prompt_ids
from tuneutils.tools.lm_bench.edge import EdgeModel
from tuneutils.tools.lm_bench.metrics import Item
from tuneutils.tools.lm_bench.params import Params
from tuneutils.tools.lm_bench.tasks import Task, apply_filters, extract

BATCH_SIZE = 8


def stop_ids(loaded: Loaded | EdgeModel) -> set[int]:
    """Tokens that end an answer: the tokenizer's EOS and the generation config's."""
    configured = getattr(loaded.model.generation_config, "eos_token_id", None)
    several = configured if isinstance(configured, list) else [configured]
    return {int(t) for t in [loaded.tokenizer.eos_token_id, *several] if t is not None}


def greedy(
    loaded: Loaded | EdgeModel, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """The most likely continuation of each prompt, and whether it ended by itself (EOS cut off)."""
    if isinstance(loaded, EdgeModel):
        return loaded.greedy(prompts, max_new_tokens, stop_ids(loaded))
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0, stop_token_ids=sorted(stop_ids(loaded)))
    made = generate(loaded.model, prompts, sampling, pad_token_id=loaded.pad_id, batch_size=BATCH_SIZE)
    stopped = [c.finish_reason == "stop" for c in made]
    return [(c.token_ids[:-1] if end else c.token_ids, end) for c, end in zip(made, stopped, strict=True)]


def check_answers(run: Run[Params], loaded: Loaded | EdgeModel, records: Sequence[Located]) -> list[Item]:
    """Answer each record's prompt; see ``metrics`` for what is made of the fields."""
    params = run.params
    prompts = []
    for located in records:
        try:
            prompts.append(prompt_ids(located.record, loaded.tokenizer, template=params.template))
        except ValueError as exc:
            raise BadRecord(located.place, str(exc)) from exc
    items: list[Item] = []
    for (tokens, stopped), located in zip(
        greedy(loaded, prompts, params.max_new_tokens), records, strict=True
    ):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        items.append(
            {**_shape(tokens, stopped), **_match(text, target_of(located.record), params.answer_pattern)}
        )
    return items


def _shape(tokens: list[int], stopped: bool) -> dict[str, Any]:
    return {
        "stop_rate": int(stopped),
        "length": len(tokens),
        "distinct_1": distinct_n(tokens, 1),
        "distinct_2": distinct_n(tokens, 2),
        "repetition": 1 - distinct_n(tokens, 4),
    }


def _match(text: str, target: str, pattern: str | None) -> dict[str, Any]:
    answer, wanted = text.strip(), target.strip()
    if pattern is not None:
        answer, wanted = extract(answer, pattern), extract(wanted, pattern, fallback="[no target]")
    return {"exact_match": int(answer == wanted), "contains": int(wanted in answer), "text": text}


def target_of(record: Record) -> str:
    """The record's own answer, as text."""
    answer = record["messages"][-1:] if "messages" in record else record.get("completion", "")
    return answer if isinstance(answer, str) else "".join(m["content"] for m in answer)


def answer_task(loaded: Loaded | EdgeModel, task: Task, max_length: int) -> list[Item]:
    """A ``generate_until`` task: greedy text up to the first stop string, filtered, compared."""
    room = max(1, max_length - task.max_gen_toks)
    prompts = [list(loaded.tokenizer.encode(c))[-room:] for c in task.contexts()]
    options = next((m for m in task.metrics if m["metric"] == "exact_match"), {})
    items: list[Item] = []
    for doc, (tokens, stopped) in zip(task.docs, greedy(loaded, prompts, task.max_gen_toks), strict=True):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        for until in task.until:
            head, found, _ = text.partition(until) if until else (text, "", "")
            text, stopped = head, stopped or bool(found)
        answer = apply_filters(task, text)
        target = task.target(doc)
        if task.config.get("doc_to_choice") and isinstance(target, int):
            target = task.choices(doc)[target]
        wanted = [str(t) for t in target] if isinstance(target, list) else [str(target)]
        hit = any(_normal(answer, options) == _normal(w, options) for w in wanted)
        items.append(
            {"exact_match": int(hit), "stop_rate": int(stopped), "length": len(tokens), "text": text}
        )
    return items


def _normal(text: str, options: dict[str, Any]) -> str:
    """Text as the harness's ``exact_match`` compares it."""
    import string

    for pattern in options.get("regexes_to_ignore") or ():
        text = re.sub(pattern, "", text)
    if options.get("ignore_case"):
        text = text.lower()
    removed = (string.punctuation if options.get("ignore_punctuation") else "") + (
        string.digits if options.get("ignore_numbers") else ""
    )
    return text.translate(str.maketrans("", "", removed))
