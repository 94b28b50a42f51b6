"""A model with the tokens of a new language, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

# isort: split
from tuneutils.shared.artifact import Artifact
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.models import Loaded, load_base, load_tokenizer, model_input, resolve
from tuneutils.shared.record_source import Source, open_source
from tuneutils.shared.records import check
from tuneutils.shared.streams import Record
from tuneutils.tools.vocab_extend.params import INITS, Params

if TYPE_CHECKING:
    from torch import Tensor

    from tuneutils.tools.vocab_extend.initialise import Weights
    from tuneutils.tools.vocab_extend.tokens import Extension


def extend(run: Run[Params]) -> dict[str, Any]:
    """Run ``vocab-extend``; returns the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    base = check_options(params)
    given: dict[str, Source] = {"records": open_source(run, run.inputs, "records", validate=_textual)}
    for role in ("heldout", "general", "source", "dictionary"):
        path = getattr(params, role)
        if path:
            given[role] = open_source(run, [path], role, validate=_pair if role == "dictionary" else _textual)
    inputs = [model_input(params.model), *(i for source in given.values() for i in source.inputs)]
    with run.artifact("model", inputs) as art:
        art.licence = inputs[0].licence
        _extend(run, art, base, given)
    return {"output": run.output, "kind": "model", "metrics": art.metrics}


def check_options(params: Params) -> Any:
    """Refuse options that do not go together; gives the model to extend.

    Raises:
        ToolError: exit 2, or what ``models.resolve`` raises.
    """
    if params.init == "wechsel" and not (params.source and params.dictionary):
        raise ToolError("--init wechsel needs --source and --dictionary", code=ExitCode.USAGE)
    if bool(params.source) != bool(params.dictionary):
        raise ToolError("--source and --dictionary go together", code=ExitCode.USAGE)
    base = resolve(params.model)
    if base.kind == "adapter":
        raise ToolError(
            f"{params.model}: is an adapter; merge it into its base first (adapter-merge)",
            code=ExitCode.USAGE,
        )
    if base.kind == "gguf":
        raise ToolError(
            f"{params.model}: is a GGUF file; import it first (model-import)", code=ExitCode.USAGE
        )
    return base


def _textual(record: Record) -> None:
    check(record, ("text", "parallel", "prompt-completion", "messages"))


def _pair(record: Record) -> None:
    check(record, ("parallel",))


def text_of(record: Record, side: str) -> str:
    """All that a record says, a line a turn; of a translated pair one side."""
    if "text" in record or side in record:
        return str(record["text"] if "text" in record else record[side])
    parts = [record[name] for name in ("messages", "prompt", "completion") if name in record]
    turns = [m["content"] for part in parts if isinstance(part, list) for m in part]
    return "\n".join([part for part in parts if isinstance(part, str)] + turns)


def _texts(source: Source, side: str, limit: int = 0) -> list[str]:
    made: list[str] = []
    for item in source.located:
        if limit and len(made) == limit:
            break
        text = text_of(item.record, side)
        if text.strip():
            made.append(text)
    if not made:
        raise ToolError(f"{', '.join(source.reader.paths)}: no text left")
    return made


def _extend(run: Run[Params], art: Artifact, base: Any, given: Mapping[str, Source]) -> None:
    from tuneutils.tools.vocab_extend.measure import fertility
    from tuneutils.tools.vocab_extend.report import headline, shown, write_report
    from tuneutils.tools.vocab_extend.save import save
    from tuneutils.tools.vocab_extend.tokens import extend_tokenizer

    params = run.params
    old = load_tokenizer(base, trust_remote_code=params.trust_remote_code)
    if not getattr(old, "is_fast", False):
        raise ToolError(f"{params.model}: its tokenizer has no tokenizer.json to extend")
    texts = _texts(given["records"], "tgt")
    made = extend_tokenizer(old.backend_tokenizer, texts, params.new_tokens, params.min_frequency)
    count = len(made.pieces)
    run.log.info("%d tokens added to %d", count, made.first)
    if count - made.added_bytes < params.new_tokens:
        run.log.warning(
            "only %d of %d tokens found at --min-frequency %d",
            count - made.added_bytes,
            params.new_tokens,
            params.min_frequency,
        )
    save_tokenizer(old, made, art.dir)
    measured = {
        role: _texts(given[role], "tgt", params.eval_documents)
        for role in ("heldout", "general")
        if role in given
    }
    report: dict[str, Any] = {
        "vocabulary": {"old_tokens": made.first, "new_tokens": count, "added_bytes": made.added_bytes},
        "init": params.init,
        "fertility": {
            name: fertility(made.old, made.new, found, run.seed)
            for name, found in {"records": texts, **measured}.items()
        },
        "bits_per_byte": {},
    }
    for name, found in report["fertility"].items():
        run.log.info(
            "%s: %s tokens per word, %s before",
            name,
            shown(found["after"]["tokens_per_word"]),
            shown(found["before"]["tokens_per_word"]),
        )
    weights = _weights(run, made, texts, given)
    if measured:
        report["bits_per_byte"] = _measure(run, base, old, art.dir, made, weights, measured)
    save(base, art.dir, made, weights[params.init], run.seed, params.trust_remote_code)
    write_report(art.dir, report)
    art.metrics.update(headline(report))


def save_tokenizer(tokenizer: Any, made: Extension, folder: Path) -> None:
    """The tokenizer's folder with the extended vocabulary in it.

    Raises:
        ToolError: read again it gives other numbers, because its class builds its vocabulary otherwise (65).
    """
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"):
        (folder / name).unlink(missing_ok=True)
    made.new.save(str(folder / "tokenizer.json"))
    again = load_tokenizer(str(folder)) if (folder / "config.json").is_file() else _read(folder)
    if again.get_vocab() != made.new.get_vocab(with_added_tokens=True):
        raise ToolError(f"a {type(tokenizer).__name__} does not keep added tokens; it cannot be extended")


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _weights(
    run: Run[Params], made: Extension, texts: Sequence[str], given: Mapping[str, Source]
) -> dict[str, Weights | None]:
    """The mixture of each way that is asked for, that of ``--init`` last."""
    from tuneutils.tools.vocab_extend.initialise import focus_weights, mean_weights, wechsel_weights
    from tuneutils.tools.vocab_extend.static import static_embeddings
    from tuneutils.tools.vocab_extend.wechsel import token_spaces

    params = run.params

    def focus() -> Weights:
        ids = [e.ids for e in made.new.encode_batch(list(texts), add_special_tokens=False)]
        size = made.first + len(made.pieces)
        return focus_weights(
            static_embeddings(ids, size, params.dimensions, params.window, run.seed), made.first
        )

    def wechsel() -> Weights:
        pairs = [(i.record["src"], i.record["tgt"]) for i in given["dictionary"].located]
        source, target = token_spaces(
            made.old,
            made.new,
            _texts(given["source"], "src"),
            texts,
            pairs,
            dimensions=params.dimensions,
            window=params.window,
            seed=run.seed,
        )
        return wechsel_weights(source, target, made.first)

    ways: dict[str, Callable[[], Weights | None]] = {
        "mean": lambda: mean_weights(made.pieces),
        "focus": focus,
        "wechsel": wechsel,
        "random": lambda: None,
    }
    wanted = [way for way in INITS if params.compare and params.heldout and way != params.init]
    if "dictionary" not in given:
        wanted = [way for way in wanted if way != "wechsel"]
    return {way: ways[way]() for way in [*wanted, params.init]}


def _measure(
    run: Run[Params],
    base: Any,
    tokenizer: Any,
    folder: Path,
    made: Extension,
    weights: Mapping[str, Weights | None],
    texts: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    from tuneutils.tools.vocab_extend.measure import measure_all
    from tuneutils.tools.vocab_extend.report import shown

    params = run.params
    where = resolve_device(run.device)
    dtype = resolve_dtype(run.dtype, where)
    model = load_base(base, where, dtype, None, params.trust_remote_code)
    loaded = Loaded(model.eval(), tokenizer, base, where, dtype)
    tables = tables_of(model, made.first)

    def put(way: str) -> Callable[[], None]:
        return lambda: put_rows(model, tables, made, weights[way], run.seed)

    found = measure_all(
        texts, loaded, _read(folder), {way: put(way) for way in weights}, params.max_length, run.seed
    )
    for name, text in found.items():
        run.log.info("%s: base: %s bits per byte", name, shown(text["base"]))
        for way, one in text["inits"].items():
            run.log.info("%s: %s: %s bits per byte", name, way, shown(one["bits_per_byte"]))
    return found


def tables_of(model: Any, first: int) -> list[Tensor]:
    """Copies of the old rows of the input embeddings and, where it is not tied to them, of the head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [module.weight for module in modules]
    return [w.detach()[:first].clone() for w in (weights[:1] if weights[0] is weights[1] else weights)]


def put_rows(model: Any, tables: Sequence[Tensor], made: Extension, weights: Any, seed: int) -> None:
    """Put new rows behind the old ones in a loaded model, making room where there is none."""
    import torch

    from tuneutils.tools.vocab_extend.initialise import new_rows

    count = made.first + len(made.pieces)
    if model.get_input_embeddings().weight.shape[0] < count:
        model.resize_token_embeddings(count, mean_resizing=False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for place, (module, table) in enumerate(zip(modules, tables, strict=False)):
            rows = new_rows(table.cpu(), count - made.first, weights, seed + place)
            module.weight[made.first : count] = rows.to(module.weight)
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias[made.first : count] = bias[: made.first].mean()
