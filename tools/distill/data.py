"""From record streams to encoded examples, for one tokenizer or for the two of teacher and student."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.records import format_of
from tuneutils.shared.supervise import IGNORE, LEARNABLE, Encoded, encode, prompt_ids, windows
from tuneutils.shared.tuning import optimizer_steps
from tuneutils.tools.distill.params import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Examples:
    """Encoded examples, and what happened on the way.

    Attributes:
        teacher: the same examples as the teacher's own tokenizer gives them; empty where it is the student's.
        origin: for each example the index of its record, counted from 0.
    """

    student: list[Encoded] = field(default_factory=list)
    teacher: list[Encoded] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    records: int = 0
    cut: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.student))

    @property
    def learnt(self) -> int:
        return sum(e.learnt for e in self.student)

    def digest(self) -> str:
        """SHA-256 over the token ids and labels, in their order."""
        made = hashlib.sha256()
        for example in self.student:
            made.update(repr((example.input_ids, example.labels)).encode())
        return made.hexdigest()


def open_stream(run: Run[Params], paths: Sequence[str], role: str) -> Source:
    """Hash record streams; with answers to be written, prompts alone will do."""
    answered = role == "records" and run.params.data in ("teacher", "student")
    return open_source(run, paths, role, formats=(*LEARNABLE, "prompt") if answered else LEARNABLE)


def encode_stream(
    run: Run[Params],
    stream: Source,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    limit: int,
) -> Examples:
    """Encode every record; plain text over ``limit`` tokens is split, anything else cut at its end.

    Args:
        teacher: its tokenizer, when that is another than the student's.

    Raises:
        ToolError: (65) a record that cannot be encoded, or none at all.
    """
    made = Examples()
    for item in stream.located:
        try:
            if teacher is None:
                pieces = encode_one(item.record, student, run.params, limit)
                made.student += pieces
            else:
                from tuneutils.tools.distill.align import align

                pairs = align(item.record, student, teacher, run.params, limit)
                pieces = [pair[0] for pair in pairs]
                made.student += pieces
                made.teacher += [pair[1] for pair in pairs]
        except ValueError as exc:
            stream.reader.refuse(item, str(exc))
            continue
        made.cut += format_of(item.record) != "text" and len(pieces[0]) == limit
        made.origin += [made.records] * len(pieces)
        made.records += 1
    refused = stream.reader.stats.refused
    if not made.student:
        raise ToolError(f"no example left of the {stream.role} ({refused} refused)")
    for count, what in ((refused, "bad records left out"), (made.cut, f"examples cut to {limit} tokens")):
        if count:
            run.log.warning("%d %s", count, what)
    return made


def encode_one(record: Any, tokenizer: Any, params: Params, limit: int) -> list[Encoded]:
    """One record as examples of at most ``limit`` tokens, each with something to learn.

    Raises:
        ValueError: there is none.
    """
    if format_of(record) == "prompt":  # the answer is the student's to write
        prompt = prompt_ids(record, tokenizer, template=params.template)[: limit - 1]
        return [Encoded([*prompt, tokenizer.eos_token_id], [IGNORE] * len(prompt) + [tokenizer.eos_token_id])]
    encoded = encode(record, tokenizer, learn=params.learn, template=params.template)
    if format_of(record) == "text" and params.data == "student":  # the rest is the student's to write
        start = min(params.prompt_tokens, len(encoded) - 1)
        pieces = [Encoded(encoded.input_ids[:limit], ([IGNORE] * start + encoded.labels[start:])[:limit])]
    elif format_of(record) == "text" and len(encoded) > limit:
        pieces = windows(encoded, limit)
    else:
        pieces = [Encoded(encoded.input_ids[:limit], encoded.labels[:limit])]
    learnable = [piece for piece in pieces if piece.learnt]
    if not learnable:
        raise ValueError(f"nothing in it is learnt within {limit} tokens")
    return learnable


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids; padding and templates do not matter."""
    if one.get_vocab() != other.get_vocab():
        return False
    probe = "The 3 café naïve — 東京\n\tdef f(x): return x**2  # ok"
    return bool(one(probe).input_ids == other(probe).input_ids)


def taken(run: Run[Params], lengths: Sequence[int]) -> list[int]:
    """Indices of the examples that the run's steps take, ascending: the trainer's own order, cut off."""
    from tuneutils.shared.training import BucketSampler

    size = run.params.batch_size * run.params.gradient_accumulation
    steps = optimizer_steps(run.params, len(lengths))
    sampler = BucketSampler(lengths, size, run.seed)
    found: set[int] = set()
    for epoch in range(math.ceil(steps * size / len(lengths)) + 1):
        left = steps - epoch * math.ceil(len(lengths) / size)
        sampler.set_epoch(epoch)
        found.update(list(sampler)[: max(0, left) * size])
    return sorted(found)
