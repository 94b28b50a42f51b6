"""``corpus-build questions``: instruction records from a corpus's own text."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run, Summary
from tuneutils.shared.errors import ToolError
from tuneutils.shared.records import Reader, write
from tuneutils.shared.streams import Record
from tuneutils.tools.corpus_build import roundtrip
from tuneutils.tools.corpus_build.mine import ABOUT_PASSAGE, Question, passages, questions
from tuneutils.tools.corpus_build.params import QuestionParams
from tuneutils.tools.corpus_build.prepare import TEXTUAL, record_text

ABOUT = "{question}\n\n{passage}"
OPEN = "{passage}\n\nQuestion: {question}"


def ask(run: Run[QuestionParams]) -> Summary:
    """Write the questions of all records.

    Raises:
        ToolError: there is nothing to ask about (65).
    """
    params = run.params
    inputs = [describe_input("records", path) for path in run.inputs]
    if params.model:
        from tuneutils.shared.models import model_input

        inputs.append(model_input(params.model))
    with run.artifact("questions", inputs) as art:
        reader = Reader(
            run.inputs, formats=TEXTUAL, on_error=run.on_error, quarantine=art.work / "quarantine.jsonl"
        )
        counts: Counter[str] = Counter()
        found = list(_found(run, reader, counts))
        if params.model:
            found = _by_model(run, found, counts)
        made = _limited(found, params, run.seed)
        if not made:
            shown = ", ".join(reader.paths)
            raise ToolError(f"{shown}: no question can be made of these {reader.stats.read} records")
        records = [_record(record, question, params) for record, question in made]
        write(art.dir / "questions.jsonl", records)
        (art.dir / "sample.md").write_text(_sample(records, run.seed), encoding="utf-8")
        art.licence = inputs[0].licence
        art.metrics = {
            "records": reader.stats.read,
            "refused": reader.stats.refused,
            "questions": len(made),
            "kinds": dict(sorted(Counter(q.kind for _, q in made).items())),
            "steps": {k: n for k, n in sorted(counts.items()) if k != "records"},
        }
    run.log.info("%d questions from %d records: %s", len(made), reader.stats.read, art.metrics["kinds"])
    return {"output": run.output, **art.metrics}


def _sample(records: Sequence[Record], seed: int, shown: int = 20) -> str:
    drawn = random.Random(seed).sample(list(records), min(shown, len(records)))
    lines = ["# Sample of the questions", ""]
    for record in drawn:
        lines += [f"- {record['kind']}: {record['question']}", f"  - {record['completion']}"]
        lines += [f"  - passage: {record['passage']}", ""]
    return "\n".join(lines)


Found = tuple[Record, Question]


def _found(run: Run[QuestionParams], reader: Reader, counts: Counter[str]) -> Iterator[Found]:
    """At most ``per_document`` questions of each record, every kind in turn."""
    for record in reader:
        by_kind: dict[str, list[Question]] = {}
        for question in questions(record_text(record, "text"), run.params.kind):
            by_kind.setdefault(question.kind, []).append(question)
        rng = random.Random(f"{run.seed}:{counts['records']}")
        counts["records"] += 1
        for found in by_kind.values():
            rng.shuffle(found)
        taken = 0
        while any(by_kind.values()) and taken < run.params.per_document:
            for found in by_kind.values():
                if found and taken < run.params.per_document:
                    yield record, found.pop()
                    taken += 1
        counts["mined"] += taken


def _by_model(run: Run[QuestionParams], found: Sequence[Found], counts: Counter[str]) -> list[Found]:
    """What the rules found and the model's own questions, as far as the model gives the answers back."""
    params = run.params
    assert params.model is not None
    model = _load(run)
    documents = {id(record): record for record, _ in found}
    owner: dict[str, Record] = {}
    for record in documents.values():
        for passage in passages(record_text(record, "text")):
            owner.setdefault(passage, record)
    rng = random.Random(run.seed)
    drawn = (
        sorted(owner)
        if len(owner) <= params.model_passages
        else rng.sample(sorted(owner), params.model_passages)
    )
    own = roundtrip.written(drawn, model, per_passage=params.per_passage, seed=run.seed)
    counts["written_by_model"] = len(own)
    everything = [*found, *((owner[q.passage], q) for q in own)]
    record_of = {id(q): record for record, q in everything}
    kept, lost = roundtrip.returned([q for _, q in everything], model, params.agreement)
    counts.update(f"lost_{q.kind}" for q in lost)
    return [(record_of[id(q)], q) for q in kept]


def _load(run: Run[QuestionParams]) -> roundtrip.Model:
    from tuneutils.shared.models import load_model
    from tuneutils.shared.sample import Sampling, generate
    from tuneutils.shared.supervise import prompt_ids

    loaded = load_model(str(run.params.model), device=run.device, dtype=run.dtype)
    ends = {loaded.tokenizer.eos_token_id, loaded.model.config.eos_token_id}
    stops = tuple(i for e in ends if e is not None for i in (e if isinstance(e, list) else [e]))
    sampling = Sampling(max_new_tokens=run.params.max_new_tokens, temperature=0, stop_token_ids=stops)
    context = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 40

    def answer(prompts: Sequence[str]) -> list[str]:
        ids = [prompt_ids({"prompt": prompt}, loaded.tokenizer)[: context - 1] for prompt in prompts]
        with run.progress(len(ids), "answers", "prompt") as bar:
            made = (
                generate(loaded.model, ids, sampling, pad_token_id=loaded.pad_id, batch_size=16)
                if ids
                else []
            )
            bar.update(len(ids))
        return [loaded.tokenizer.decode(c.token_ids, skip_special_tokens=True).strip() for c in made]

    return answer


def _limited(found: Sequence[Found], params: QuestionParams, seed: int) -> list[Found]:
    """At most ``limit`` of them, at random but in their order; none asked twice."""
    unique = list({(q.question, q.answer, q.passage): (record, q) for record, q in found}.values())
    if params.limit is None or len(unique) <= params.limit:
        return unique
    kept = sorted(random.Random(seed).sample(range(len(unique)), params.limit))
    return [unique[i] for i in kept]


def _record(record: Record, question: Question, params: QuestionParams) -> Record:
    """A prompt-completion record with the passage and where it is from."""
    if question.kind in ABOUT_PASSAGE:
        prompt = ABOUT.format(passage=question.passage, question=question.question)
    elif params.with_passage:
        prompt = OPEN.format(passage=question.passage, question=question.question)
    else:
        prompt = question.question
    source = {k: record[k] for k in ("id", "path", "offset", "sha256", "licence") if k in record}
    return {
        "prompt": prompt, "completion": question.answer, "kind": question.kind, "question": question.question,
        "passage": question.passage, **source,
    }  # fmt: skip
