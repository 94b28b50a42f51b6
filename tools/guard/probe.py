"""Probes in, the model's replies with their labels out: the log that a guard learns from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Input, check_stream, describe_input, sha256_file, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.evaluate_model import context_length
from tuneutils.shared.guarding import decode
from tuneutils.shared.models import Loaded, load_model, model_input, resolve
from tuneutils.shared.records import Located, Reader, Record, open_writer
from tuneutils.shared.sample import Sampling, generate
from tuneutils.shared.supervise import prompt_ids
from tuneutils.tools.guard import probes
from tuneutils.tools.guard.exchanges import check_prompt
from tuneutils.tools.guard.params import ProbeParams

BUILTIN = "builtin:"


def probe(run: Run[ProbeParams]) -> dict[str, Any]:
    """Run ``guard probe``; returns the summary."""
    params = run.params
    resolve(params.model)
    inputs = [source_input(path) for path in run.inputs]
    inputs.append(model_input(params.model))
    check_stream(run, inputs)
    found = ProbeReader(run, validate)
    loaded = load_model(
        params.model, device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
    )
    failed = written = 0
    located = limited(found.located(), params.limit)
    with open_writer(str(run.output)) as writer:
        while batch := list(islice(located, 4 * params.batch_size)):
            ready = prepared(loaded, batch, params.template, found.refuse)
            for record in answered(loaded, ready, params, run.seed, offset=written):
                writer.write(record)
                written += 1
                failed += not record["label"]
            run.log.info("%d probes, %d failed", written, failed)
    metrics = {"probes": written, "failed": failed, "refused": found.refused}
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=inputs[0].licence)
    return {"output": run.output, "metrics": metrics}


def limited(located: Iterator[Located], limit: int | None) -> Iterator[Located]:
    """The first ``limit`` probes of each category, harmless ones and others apart; all without a limit."""
    taken: Counter[tuple[Any, bool]] = Counter()
    for item in located:
        kind = item.record.get("category"), fails(item.record) == "never"
        taken[kind] += 1
        if limit is None or taken[kind] <= limit:
            yield item


def validate(record: Record) -> None:
    """A probe: a prompt, and fails where it is not ``complies``.

    Raises:
        ValueError: with the field and the reason.
    """
    if "prompt" not in record:
        raise ValueError(f"needs the field prompt; has {', '.join(sorted(record)) or 'none'}")
    check_prompt(record["prompt"])
    probes.check_spec(fails(record))


def fails(record: Record) -> Any:
    """What reply fails a probe: one that does not refuse, where nothing else is said."""
    return record.get("fails", "complies")


def source_input(path: str) -> Input:
    """A stream of records, or built-in probes, as an input of the manifest."""
    if not path.startswith(BUILTIN):
        return describe_input("records", path)
    split = path.removeprefix(BUILTIN)
    if split not in probes.SPLITS:
        raise ToolError(
            f"{path}: no such probes{nearest(split, probes.SPLITS)}; take builtin:train or builtin:heldout",
            code=ExitCode.MISSING_INPUT,
        )
    data = Path(probes.__file__).parent / "data" / "probes.yaml"
    return Input("records", path, sha256_file(data), licence="Apache-2.0", source="tuneutils")


class ProbeReader:
    """Records of files and of built-in probes, in the order in which they were named."""

    def __init__(self, run: Run[Any], judge: Any) -> None:
        self.paths = list(run.inputs)
        quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
        files = [p for p in self.paths if not p.startswith(BUILTIN)]
        self.reader = (
            Reader(files, on_error=run.on_error, quarantine=quarantine, validate=judge) if files else None
        )

    def located(self) -> Iterator[Located]:
        for path in self.paths:
            if path.startswith(BUILTIN):
                made = probes.builtin(path.removeprefix(BUILTIN))
                yield from (Located(record, path, i + 1) for i, record in enumerate(made))
        if self.reader is not None:
            yield from self.reader.located()

    @property
    def refused(self) -> int:
        return self.reader.stats.refused if self.reader is not None else 0

    def refuse(self, item: Located, reason: str) -> None:
        if self.reader is None or item.path.startswith(BUILTIN):
            raise ToolError(f"{item.place}: {reason}")
        self.reader.refuse(item, reason)


def prepared(
    loaded: Loaded, batch: Sequence[Located], template: str, refuse: Callable[[Located, str], None]
) -> list[tuple[Record, list[int]]]:
    """The records with their prompts' tokens; what cannot be encoded or does not fit is refused."""
    limit = context_length(loaded.model)
    made = []
    for item in batch:
        try:
            ids = prompt_ids(item.record, loaded.tokenizer, template=template)
            if limit is not None and len(ids) >= limit:
                raise ValueError(f"the prompt has {len(ids)} tokens; the model's context takes {limit - 1}")
        except ValueError as exc:
            refuse(item, str(exc))
            continue
        made.append((item.record, ids))
    return made


def answered(
    loaded: Loaded, ready: Sequence[tuple[Record, list[int]]], params: Any, seed: int, *, offset: int = 0
) -> list[Record]:
    """The records with the model's ``completion``, and ``label`` and ``harmless`` by their ``fails``."""
    tokenizer = loaded.tokenizer
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=getattr(params, "temperature", 0.0),
        stop_token_ids=(int(tokenizer.eos_token_id),),
        seed=seed,
    )
    made = generate(
        loaded.model, [ids for _, ids in ready], sampling, batch_size=params.batch_size,
        pad_token_id=loaded.pad_id, row_ids=range(offset, offset + len(ready)),
    )  # fmt: skip
    out = []
    for (record, _), completion in zip(ready, made, strict=True):
        reply = decode(tokenizer, completion.token_ids)
        label = not probes.failed(fails(record), reply)
        said = {"completion": reply} if reply.strip() else {}  # no reply at all is a prompt alone
        out.append({**record, **said, "label": label, "harmless": fails(record) == "never"})
    return out
