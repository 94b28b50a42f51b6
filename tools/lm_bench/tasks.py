"""Task files in lm-evaluation-harness's YAML format: the part that needs neither code nor a network.

Rendering follows the harness (``lm_eval/api/task.py``, 0.4.13): templates, few-shot sampling and its seed,
delimiters. ``tests/tools/lm_bench/test_harness.py`` holds it to that.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from tuneutils.shared.errors import ExitCode, ToolError, nearest
from tuneutils.shared.records import read

Doc = dict[str, Any]

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
SPLITS = ("test_split", "validation_split", "training_split")
FEWSHOT_SEED = 1234  # the harness's default fewshot_random_seed
MAX_GEN_TOKS = 256
KEYS = {
    "task", "dataset_path", "dataset_name", "dataset_kwargs", *SPLITS, "fewshot_split", "doc_to_text",
    "doc_to_target", "doc_to_choice", "output_type", "metric_list", "num_fewshot", "description",
    "target_delimiter", "fewshot_delimiter", "filter_list", "generation_kwargs", "fewshot_config",
}  # fmt: skip
IGNORED = {"metadata", "tag", "task_alias", "group", "should_decontaminate", "doc_to_decontamination_query"}
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}
DEFAULT_METRICS = {**METRICS, "multiple_choice": ("acc", "acc_norm")}
FILTERS = ("regex", "take_first", "remove_whitespace", "lowercase")

_jinja = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_jinja.filters["regex_replace"] = lambda text, pattern, repl, count=0: re.sub(
    pattern, repl, text, count=count
)


@dataclass(frozen=True)
class Task:
    """A task file with its documents.

    Attributes:
        config: the file's keys, its includes merged in.
        data_files: what was read, for the manifest.
        fewshot_docs: the pool that examples come from.
    """

    name: str
    path: Path
    config: dict[str, Any]
    docs: list[Doc]
    fewshot_docs: list[Doc]
    data_files: tuple[Path, ...]

    @property
    def output_type(self) -> str:
        return str(self.config.get("output_type", "generate_until"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self.config.get("metric_list") or [{"metric": m} for m in DEFAULT_METRICS[self.output_type]]

    @property
    def until(self) -> list[str]:
        given = (self.config.get("generation_kwargs") or {}).get(
            "until", self.config_text("fewshot_delimiter")
        )
        return [given] if isinstance(given, str) else list(given)

    @property
    def max_gen_toks(self) -> int:
        return int((self.config.get("generation_kwargs") or {}).get("max_gen_toks", MAX_GEN_TOKS))

    def config_text(self, key: str) -> str:
        defaults = {"target_delimiter": " ", "fewshot_delimiter": "\n\n", "description": ""}
        return str(self.config.get(key, defaults[key]))

    def text(self, doc: Doc) -> str:
        """The context of a document, without its answer."""
        made = self._render("doc_to_text", doc)
        if isinstance(made, int):
            raise self.refuse("doc_to_text gives a choice's index (several inputs, one target)", harness=True)
        return made

    def target(self, doc: Doc) -> Any:
        """The gold answer: a choice's index, a string, or a list of either."""
        value = self._render("doc_to_target", doc)
        if isinstance(value, str) and len(value) >= 2 and value[0] == "[" and value[-1] == "]":
            try:
                return ast.literal_eval(value)
            except (SyntaxError, ValueError):
                return value
        return value

    def choices(self, doc: Doc) -> list[str]:
        """The answers to choose from."""
        given = self.config["doc_to_choice"]
        if isinstance(given, dict):
            given = list(given.values())
        if isinstance(given, str):
            given = doc[given] if given in doc else self._literal("doc_to_choice", self._template(given, doc))
        if not isinstance(given, list) or not given or not all(isinstance(c, str) and c for c in given):
            raise self.refuse(f"doc_to_choice must give a list of non-empty strings, gives {given!r:.80}")
        return given

    def gold(self, doc: Doc) -> list[int]:
        """Indices of the right choices."""
        target, choices = self.target(doc), self.choices(doc)
        found = []
        for one in target if isinstance(target, list) else [target]:
            if isinstance(one, str):
                one = choices.index(one) if one in choices else -1
            if not isinstance(one, int) or not 0 <= one < len(choices):
                raise self.refuse(f"doc_to_target gives {target!r}, not one of the {len(choices)} choices")
            found.append(int(one))
        return found

    def contexts(self) -> list[str]:
        """The full prompt of every document: description, few-shot examples, question."""
        rng = Random(FEWSHOT_SEED)
        description = self.config_text("description")
        made = []
        for doc in self.docs:
            opening = self._template(description, doc) if description else ""
            examples = "".join(self._example(d) for d in self._sample(rng, doc))
            made.append(opening + examples + self.text(doc))
        return made

    def _sample(self, rng: Random, doc: Doc) -> Sequence[Doc]:
        count = int(self.config.get("num_fewshot") or 0)
        if not count:
            return []
        same = self.config.get("fewshot_split") == self._split()[1]
        first_n = (self.config.get("fewshot_config") or {}).get("sampler") == "first_n"
        if len(self.fewshot_docs) < count + same:
            raise self.refuse(
                f"num_fewshot {count} needs more documents than the {len(self.fewshot_docs)} there"
            )
        if first_n:
            return [d for d in self.fewshot_docs if not (same and d == doc)][:count]
        drawn = rng.sample(self.fewshot_docs, count + same)
        kept = [d for d in drawn if not (same and d == doc)][:count]
        if len(kept) < count:
            kept = rng.sample([d for d in self.fewshot_docs if d != doc], count)
        return kept

    def _example(self, doc: Doc) -> str:
        target = self.target(doc)
        if isinstance(target, int) and "doc_to_choice" in self.config:
            target = self.choices(doc)[target]
        elif isinstance(target, list):
            target = target[0]
        delimiter = self.config_text("target_delimiter")
        return self.text(doc) + delimiter + str(target) + self.config_text("fewshot_delimiter")

    def _split(self) -> tuple[str, str]:
        key = next(k for k in SPLITS[:2] if self.config.get(k))
        return key, str(self.config[key])

    def _render(self, key: str, doc: Doc) -> Any:
        given = self.config[key]
        if not isinstance(given, str):
            return given
        if given in doc:
            return doc[given]
        text = self._template(given, doc)
        return ast.literal_eval(text) if text.isdigit() and self.config.get("doc_to_choice") else text

    def _template(self, template: str, doc: Doc) -> str:
        try:
            return _jinja.from_string(template).render(**doc)
        except TemplateError as exc:
            raise self.refuse(f"template {template!r:.60}: {exc}") from exc

    def _literal(self, key: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError) as exc:
            raise self.refuse(f"{key} renders to {text!r:.60}, which is no list") from exc

    def refuse(self, reason: str, *, harness: bool = False) -> ToolError:
        hint = "; --engine harness may run it" if harness else ""
        return ToolError(f"{self.path}: {reason}{hint}")


class _Loader(yaml.SafeLoader):
    """YAML that refuses ``!function`` by name."""


def _refuse_function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    value = loader.construct_scalar(node)  # type: ignore[arg-type]
    raise yaml.constructor.ConstructorError(None, None, f"!function {value}", node.start_mark)


_Loader.add_constructor("!function", _refuse_function)


def load_config(path: Path) -> dict[str, Any]:
    """The keys of a task file with its ``include`` files merged in, the file's own on top.

    Raises:
        ToolError: absent (66), no YAML, code (``!function``), or a key that is not supported.
    """
    if not path.is_file():
        raise ToolError(
            f"{path}: no such task file; --engine harness runs the harness's own tasks by name",
            code=ExitCode.MISSING_INPUT,
        )
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as exc:
        reason = " ".join(str(exc).split())
        if "!function" in reason:
            reason = (
                f"{reason.split(' in ')[0]}: tasks with code are not run here; --engine harness runs them"
            )
        raise ToolError(f"{path}: {reason}") from exc
    if not isinstance(config, dict):
        raise ToolError(f"{path}: a task file must be a mapping")
    included = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        merged.update(load_config(path.parent / name))
    return {**merged, **config}


def _check(path: Path, config: dict[str, Any]) -> None:
    def refuse(reason: str) -> ToolError:
        return ToolError(f"{path}: {reason}; --engine harness may run it")

    for key in config:
        if key not in KEYS | IGNORED:
            raise refuse(f"key {key!r} is not supported{nearest(key, KEYS)}")
    kind = config.get("output_type", "generate_until")
    if kind not in OUTPUT_TYPES:
        raise refuse(f"output_type {kind!r} is none of {', '.join(OUTPUT_TYPES)}")
    if config.get("dataset_path") not in ("json", "parquet"):
        raise refuse(
            f"dataset_path {config.get('dataset_path')!r} is not json or parquet with local data_files"
        )
    needed = ["doc_to_target"] + (["doc_to_text"] if kind != "loglikelihood_rolling" else [])
    for key in [*needed, *(["doc_to_choice"] if kind == "multiple_choice" else [])]:
        if key not in config:
            raise ToolError(f"{path}: output_type {kind} needs the key {key!r}")
    for metric in config.get("metric_list") or ():
        if metric.get("metric") not in METRICS[kind] or metric.get("hf_evaluate"):
            raise refuse(f"metric {metric.get('metric')!r} is not supported for {kind}")
    for pipeline in config.get("filter_list") or ():
        for step in pipeline["filter"]:
            if step["function"] not in FILTERS:
                raise refuse(f"filter {step['function']!r} is not supported")
    if (config.get("generation_kwargs") or {}).get("do_sample"):
        raise refuse("generation_kwargs do_sample: only greedy generation is supported")
    sampler = config.get("fewshot_config") or {}
    if set(sampler) - {"sampler"} or sampler.get("sampler", "default") not in ("default", "first_n"):
        raise refuse("fewshot_config beyond sampler: default or first_n is not supported")


def data_files(path: Path, config: dict[str, Any]) -> dict[str, list[Path]]:
    """Local files by split; relative ones from the working directory, else from the task file's folder."""
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if not given:
        raise ToolError(f"{path}: dataset_kwargs.data_files names no local file; --engine harness may run it")
    splits = given if isinstance(given, dict) else {"train": given}
    found = {}
    for split, names in splits.items():
        files = []
        for name in [names] if isinstance(names, str) else names:
            at = Path(name) if Path(name).is_file() else path.parent / name
            if not at.is_file():
                raise ToolError(f"{path}: data file {name}: no such file", code=ExitCode.MISSING_INPUT)
            files.append(at)
        found[str(split)] = files
    return found


def _read_docs(files: Sequence[Path]) -> list[Doc]:
    docs: list[Doc] = []
    for file in files:
        if file.suffix == ".json" and file.read_bytes().lstrip()[:1] == b"[":
            try:
                docs += json.loads(file.read_text(encoding="utf-8"))
            except ValueError as exc:
                raise ToolError(f"{file}: not JSON: {exc}") from exc
        else:
            docs += read(file)
    fields = dict.fromkeys(key for doc in docs for key in doc)
    return [{key: doc.get(key) for key in fields} for doc in docs]


def load_task(given: str, *, num_fewshot: int | None = None, limit: int | None = None) -> Task:
    """A task file and its documents, checked before any model is loaded.

    Args:
        num_fewshot: overrides the file's.
        limit: keep only the first documents.
    """
    path = Path(given)
    config = load_config(path)
    _check(path, config)
    if num_fewshot is not None:
        config["num_fewshot"] = num_fewshot
    files = data_files(path, config)
    split = next((str(config[k]) for k in SPLITS[:2] if config.get(k)), None)
    if split is None or split not in files:
        raise ToolError(f"{path}: needs a test_split among the splits of data_files: {', '.join(files)}")
    examples = next((str(config[k]) for k in ("fewshot_split", *SPLITS[::-1]) if config.get(k)), split)
    docs = _read_docs(files[split])
    pool = _read_docs(files[examples]) if examples in files and config.get("num_fewshot") else []
    used = tuple(dict.fromkeys([*files[split], *(files.get(examples, []) if pool else [])]))
    name = str(config.get("task") or path.stem)
    return Task(name, path, config, docs[:limit] if limit else docs, pool, used)


def apply_filters(task: Task, text: str) -> str:
    """The answer after the task's first filter pipeline (regex, lowercase, remove_whitespace)."""
    pipelines = task.config.get("filter_list") or [{"filter": []}]
    for step in pipelines[0]["filter"]:
        function = step["function"]
        if function == "lowercase":
            text = text.lower()
        elif function == "remove_whitespace":
            text = text.strip()
        elif function == "regex":
            text = extract(text, step.get("regex_pattern", r"#### (\-?[0-9\.\,]+)"),
                           step.get("group_select", 0), step.get("fallback", "[invalid]"))  # fmt: skip
    return text


def extract(text: str, pattern: str, select: int = 0, fallback: str = "[invalid]") -> str:
    """The ``select``-th match of a pattern, its first non-empty group where it has groups, stripped."""
    matches = re.findall(pattern, text)
    if not matches:
        return fallback
    match = matches[select]
    if isinstance(match, tuple):
        match = next((m for m in match if m), fallback)
    return str(match).strip()
