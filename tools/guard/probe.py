"""Probes in, the model's replies with their labels out: the log that a guard learns from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import Input, check_stream, describe_input, sha256_file, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError, nearest
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
    located = found.located()
    with open_writer(str(run.output)) as writer:
        while batch := list(islice(located, 4 * params.batch_size)):
            records = [item.record for item in batch]
            for record in answered(loaded, records, params, run.seed, offset=written):
                writer.write(record)
                written += 1
                failed += not record["label"]
            run.log.info("%d probes, %d failed", written, failed)
    metrics = {"probes": written, "failed": failed, "refused": found.refused}
    if run.output != "-" and Path(str(run.output)).is_file():
        sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=inputs[0].licence)
    return {"output": run.output, "metrics": metrics}


def validate(record: Record) -> None:
    """A probe: prompt and fails.

    Raises:
        ValueError: with the field and the reason.
    """
    if "prompt" not in record:
        raise ValueError(f"needs the fields prompt+fails; has {', '.join(sorted(record)) or 'none'}")
    check_prompt(record["prompt"])
    if "fails" not in record:
        raise ValueError("field 'fails': missing; it says what reply is a failure, or never")
    probes.check_spec(record["fails"])


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


def answered(
    loaded: Loaded, records: Sequence[Record], params: Any, seed: int, *, offset: int = 0
) -> list[Record]:
    """The records with the model's ``completion``, and ``label`` and ``harmless`` by their ``fails``."""
    tokenizer = loaded.tokenizer
    ids = [prompt_ids(r, tokenizer, template=params.template) for r in records]
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=getattr(params, "temperature", 0.0),
        stop_token_ids=(int(tokenizer.eos_token_id),),
        seed=seed,
    )
    made = generate(
        loaded.model, ids, sampling, batch_size=params.batch_size, pad_token_id=loaded.pad_id,
        row_ids=range(offset, offset + len(records)),
    )  # fmt: skip
    out = []
    for record, completion in zip(records, made, strict=True):
        reply = decode(tokenizer, completion.token_ids)
        label = not probes.failed(record["fails"], reply)
        said = {"completion": reply} if reply.strip() else {}  # no reply at all is a prompt alone
        out.append({**record, **said, "label": label, "harmless": record["fails"] == "never"})
    return out
