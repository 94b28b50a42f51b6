"""Text in one language in, pairs with a machine's translation as source side out (Sennrich et al. 2016)."""

from __future__ import annotations

import shlex
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared.artifact import check_stream, describe_input, sidecar
from tuneutils.shared.command import Run
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.languages import name_of
from tuneutils.shared.records import Located, Reader, open_writer
from tuneutils.shared.streams import Record
from tuneutils.tools.xl_parallel.params_pairs import BacktranslateParams

#: Translations of some texts, in their order; None where there is none, with the reason counted.
Translate = Callable[[Sequence[str], Counter[str]], list[str | None]]
#: A command costs its start each time; it gets this many batches at once.
COMMAND_BATCHES = 1000


def backtranslate(run: Run[BacktranslateParams]) -> dict[str, Any]:
    """Run ``xl-parallel backtranslate``; returns the summary."""
    params = run.params
    if (params.model is None) == (params.command is None):
        raise ToolError("give one translator: -m MODEL or --command COMMAND", code=ExitCode.USAGE)
    if "{text}" not in params.prompt:
        raise ToolError("--prompt: has no {text}", code=ExitCode.USAGE)
    inputs = [describe_input("records", path) for path in run.inputs]
    if params.model:
        from tuneutils.shared.models import model_input

        inputs.append(model_input(params.model))
    check_stream(run, inputs)
    quarantine = f"{run.output}.quarantine.jsonl" if run.output not in (None, "-") else None
    reader = Reader(run.inputs, on_error=run.on_error, quarantine=quarantine)
    counts: Counter[str] = Counter()
    translate = by_model(run) if params.model else by_command(str(params.command))
    size = params.batch_size * (1 if params.model else COMMAND_BATCHES)
    with open_writer(str(run.output)) as writer:
        batch: list[tuple[Record, str]] = []
        for located in reader.located():
            text = _text(located, params, reader)
            if text is not None:
                batch.append((located.record, text))
            if len(batch) == size:
                for record in _translated(batch, translate, params, counts):
                    writer.write(record)
                batch = []
        for record in _translated(batch, translate, params, counts):
            writer.write(record)
    metrics = {
        "read": reader.stats.read, "written": writer.written, "dropped": dict(sorted(counts.items())),
        "refused": reader.stats.refused,
    }  # fmt: skip
    sidecar(run, Path(str(run.output)), inputs, metrics=metrics, licence=inputs[0].licence)
    shown = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    run.log.info("%d of %d texts translated; dropped: %s", writer.written, reader.stats.read, shown or "none")
    return {"output": run.output, "metrics": metrics}


def _text(located: Located, params: BacktranslateParams, reader: Reader) -> str | None:
    """A record's text on one line; None where it has none, and is refused."""
    record = located.record
    field = params.field or ("tgt" if "tgt" in record else "text")
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        reader.refuse(located, f"field {field!r}: must be a text; name another with --field")
        return None
    return " ".join(value.split())


def _translated(
    batch: Sequence[tuple[Record, str]],
    translate: Translate,
    params: BacktranslateParams,
    counts: Counter[str],
) -> list[Record]:
    made = []
    translations = translate([text for _, text in batch], counts) if batch else []
    for (record, text), translation in zip(batch, translations):
        if translation is None:
            continue
        if not translation.strip():
            counts["empty"] += 1
        elif translation.casefold() == text.casefold():
            counts["not translated"] += 1
        else:
            kept = {k: v for k, v in record.items() if k not in ("text", "src", "tgt", "score")}
            made.append(
                {
                    "src": translation, "tgt": text, **kept, "src_lang": params.to_lang,
                    "tgt_lang": params.from_lang, "synthetic": "src",
                }
            )  # fmt: skip
    return made


def by_command(command: str) -> Translate:
    """A program that reads lines on stdin and writes as many on stdout; it runs without a shell.

    Raises:
        ToolError: it cannot be read as words (2), cannot be run or fails (69), or gives another number of
            lines (65).
    """
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise ToolError(f"--command {command}: {str(exc).lower()}", code=ExitCode.USAGE) from exc
    if not words:
        raise ToolError("--command: is empty", code=ExitCode.USAGE)

    def translate(texts: Sequence[str], _: Counter[str]) -> list[str | None]:
        given = "".join(f"{text}\n" for text in texts)
        try:
            done = subprocess.run(
                words, input=given.encode("utf-8", "replace"), capture_output=True, check=False
            )
        except OSError as exc:
            raise ToolError(f"--command {words[0]}: {exc.strerror}", code=ExitCode.UNAVAILABLE) from exc
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise ToolError(
                f"--command {words[0]}: ended with {done.returncode}: {said[-1] if said else 'no message'}",
                code=ExitCode.UNAVAILABLE,
            )
        lines = done.stdout.decode("utf-8", "replace").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) != len(texts):
            raise ToolError(
                f"--command {words[0]}: gave {len(lines)} lines for {len(texts)}; it must give one for each"
            )
        return [" ".join(line.split()) for line in lines]

    return translate


def by_model(run: Run[BacktranslateParams]) -> Translate:
    """A language model asked to translate; what it does not finish is dropped."""
    from tuneutils.shared.models import load_model
    from tuneutils.shared.sample import Sampling, generate
    from tuneutils.shared.supervise import prompt_ids

    params = run.params
    loaded = load_model(
        str(params.model), device=run.device, dtype=run.dtype, trust_remote_code=params.trust_remote_code
    )
    ends = {loaded.tokenizer.eos_token_id, loaded.model.config.eos_token_id}
    stops = tuple(i for e in ends if e is not None for i in (e if isinstance(e, list) else [e]))
    sampling = Sampling(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        stop_token_ids=stops,
        seed=run.seed,
    )
    context = getattr(loaded.model.config, "max_position_embeddings", None) or 1 << 40
    names = {"from_lang": name_of(params.from_lang), "to_lang": name_of(params.to_lang)}
    seen = 0

    def translate(texts: Sequence[str], counts: Counter[str]) -> list[str | None]:
        nonlocal seen
        asked = [params.prompt.replace("{from_lang}", names["from_lang"]) for _ in texts]
        asked = [a.replace("{to_lang}", names["to_lang"]).replace("{text}", t) for a, t in zip(asked, texts)]
        ids = [prompt_ids({"prompt": a}, loaded.tokenizer) for a in asked]
        fitting = [i for i, prompt in enumerate(ids) if len(prompt) < context]
        if len(fitting) < len(ids):
            counts["too long"] += len(ids) - len(fitting)
        made: list[str | None] = [None] * len(texts)
        answers = generate(
            loaded.model, [ids[i] for i in fitting], sampling, pad_token_id=loaded.pad_id,
            batch_size=params.batch_size, row_ids=[seen + i for i in fitting],
        )  # fmt: skip
        seen += len(texts)
        for i, answer in zip(fitting, answers):
            if answer.finish_reason != "stop":
                counts["unfinished"] += 1
                continue
            said = loaded.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
            made[i] = " ".join(said.split())
        return made

    return translate
