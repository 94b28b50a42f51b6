"""What the contract test cannot guess of a tool: inputs that work, options that make it quick, what it makes.

A new tool adds one ``Case`` (or several, when it has several kinds of input or output).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import invoke, load_tool

CPU = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Assets:
    """What tools can be tried on; all built by the test session, none to be written to.

    Attributes:
        model: folder of the tiny model.
        artifact: the same, imported: a folder with a manifest.
        adapters: two LoRA adapters for it.
        records: folder with ``<format>.jsonl`` for each record format.
    """

    model: Path
    artifact: Path
    adapters: tuple[Path, Path]
    records: Path

    def stream(self, format: str) -> Path:  # noqa: A002 - the records' own word
        return self.records / f"{format}.jsonl"


@dataclass(frozen=True)
class Case:
    """One way to use a tool.

    Attributes:
        tool: the command; a subcommand after a space.
        inputs: the positional arguments.
        args: options without which it would not run, or not quickly.
        reads: the record format of the inputs; None when they are no records.
        makes: ``directory``, ``stream`` or ``nothing``.
        output: the name given to ``-o``.
        paths: options of ``args`` whose value is a file or folder that must exist.
        stdin: reads records from stdin without an input.
        same_again: a second run elsewhere gives the same bytes.
        long: what it makes is as long as what it reads.
        keeps: its records are those that it reads, with more fields.
        says: what it says of a record without the fields that it needs.
        label: tells apart the cases of one tool.
    """

    tool: str
    inputs: Callable[[Assets], list[Path]]
    args: Callable[[Assets], list[str | Path]] = lambda _: []
    reads: str | None = None
    makes: str = "directory"
    output: str = "out"
    paths: tuple[str, ...] = ()
    stdin: bool = False
    same_again: bool = True
    long: bool = True
    keeps: bool = True
    says: str = ""
    label: str = ""

    @property
    def id(self) -> str:
        return f"{self.tool} {self.label}".strip()


def votes(assets: Assets) -> Path:
    """Simulated votes on the preference records."""
    path = assets.records / "votes.jsonl"
    if not path.exists():
        args = ("-q", "--overlap", "2", "--raters", "2", "-o", path, assets.stream("preference"))
        assert invoke(load_tool("pref-collect"), "simulate", *args).code == 0
    return path


def reward_model(assets: Assets) -> Path:
    """A reward model trained for a moment on the preference records."""
    path = assets.records / "reward-model"
    if not path.exists():
        args = ("-q", "-m", assets.model, "-o", path, assets.stream("preference"), *QUICK_RM, *CPU)
        assert invoke(load_tool("rm-train"), *args).code == 0
    return path


def guard(assets: Assets) -> Path:
    """A guard of the imported tiny model, learnt from the labelled records."""
    path = assets.records / "guard"
    if not path.exists():
        args = ("-q", "-m", assets.model, "-o", path, assets.stream("unpaired"), *QUICK_GUARD, *CPU)
        assert invoke(load_tool("guard"), "train", *args).code == 0
    return path


def fusion(assets: Assets) -> Path:
    """A fusion of the two adapters, trained for a moment."""
    path = assets.records / "fusion"
    if not path.exists():
        adapters = [x for a in assets.adapters for x in ("--adapter", a)]
        args = ("-q", "-m", assets.model, *adapters, "-o", path, assets.stream("text"), *QUICK_FUSE, *CPU)
        assert invoke(load_tool("adapter-fuse"), "train", *args).code == 0
    return path


def corpus(assets: Assets) -> Path:
    """A corpus of a few documents that say much the same in other words."""
    path = assets.records / "corpus"
    if not path.exists():
        source = assets.records / "corpus.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_documents()))
        args = (
            "-q",
            "--rule",
            "c4-lorem-ipsum",
            "--heldout",
            "0.3",
            "--substring-words",
            "0",
            "-o",
            path,
            source,
        )
        assert invoke(load_tool("corpus-build"), *args).code == 0
    return path


def tiny_documents(count: int = 60) -> list[str]:
    """Reports of one kind, each of two sentences with their own words and numbers."""
    rng = random.Random(0)
    nouns = ("court", "judge", "clerk", "jury", "panel", "board", "mayor", "guard", "agent", "nurse")
    things = ("motion", "appeal", "letter", "report", "notice", "claim", "order", "record", "paper", "draft")

    def pick(words: Sequence[str]) -> str:
        return rng.choice(words)

    return [
        " ".join(
            f"On day {i} the {pick(nouns)} of town {n} sent the {pick(things)} number {rng.randrange(10**6)} to the "
            f"{pick(nouns)} and kept the {pick(things)}."
            for n in range(2)
        )
        for i in range(count)
    ]


def gold_swaps(assets: Assets) -> Path:
    """Two texts with their counterparts."""
    path = assets.records / "gold.jsonl"
    path.write_text(
        '{"text": "She left.", "swapped": "He left."}\n{"text": "It rained.", "swapped": "It rained."}\n'
    )
    return path


def principles(assets: Assets) -> Path:
    """A constitution whose requests fit into the tiny model's context."""
    path = assets.records / "principles.yaml"
    path.write_text(
        "principles: [{id: one, principle: Be kind., critique_request: Why., revision_request: Again.}]\n"
    )
    return path


QUICK_GUARD = ("--budget", "0.5", "--folds", "2", "--calibration-share", "0.4", "--layers", "2")


def sentence_encoder(assets: Assets) -> Path:
    """A sentence encoder learnt from the parallel records."""
    path = assets.records / "encoder"
    if not path.exists():
        args = ("-q", "--dim", "4", "-o", path, assets.stream("parallel"))
        assert invoke(load_tool("xl-parallel"), "encoder", *args).code == 0
    return path


def pile(assets: Assets, side: str) -> Path:
    """One side of the parallel records, a sentence a line."""
    path = assets.records / f"{side}.txt"
    lines = (json.loads(line)[side] for line in assets.stream("parallel").read_text("utf-8").splitlines())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def word_pairs(assets: Assets) -> Path:
    """A dictionary of words that come in the texts."""
    path = assets.records / "words.tsv"
    path.write_text("bird\tave\nwater\tagua\nthe\tel\nand\ty\n", encoding="utf-8")
    return path


def sentence_pairs(assets: Assets) -> Path:
    """Two pairs of a stereotype and its opposite."""
    path = assets.records / "pairs.jsonl"
    pair = '{"sent_more": "The old man forgot.", "sent_less": "The young man forgot.", "bias_type": "age"}\n'
    path.write_text(pair + pair.replace("man", "woman"))
    return path


def predictions(assets: Assets) -> Path:
    """Predictions of two groups of twenty."""
    path = assets.records / "predictions.jsonl"
    rows = ((g, i % 3 == 0, i % 2 == 0) for g in "ab" for i in range(20))
    line = '{{"group": "{}", "prediction": {}, "label": {}}}\n'
    path.write_text("".join(line.format(g, str(p).lower(), str(y).lower()) for g, p, y in rows))
    return path


QUICK_FUSE = ("--max-steps", "2", "--batch-size", "2", "--kind", "gate")
QUICK_RM = ("--max-steps", "2", "--batch-size", "2", "--learning-rate", "0.01")

CASES = [
    Case("model-import", lambda a: [a.model], lambda _: ["--licence", "MIT"]),
    Case(
        "data-import",
        lambda a: [a.stream("prompt-completion")],
        lambda _: ["--licence", "MIT"],
        reads="prompt-completion",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        label="stream",
    ),
    Case(
        "data-import",
        lambda a: [a.stream("messages")],
        lambda _: ["--split", "train=0.5,test=0.5", "--licence", "MIT"],
        reads="messages",
        stdin=True,
        label="folder",
    ),
    Case(
        "bias-scan data",
        lambda a: [a.stream("messages")],
        lambda _: ["--min-mentions", "1"],
        reads="messages",
        stdin=True,
        paths=("--lexicon", "--compare"),
    ),
    Case(
        "bias-scan model",
        lambda a: [a.model],
        lambda a: ["--set", f"crows-pairs={sentence_pairs(a)}", "--resamples", "100", *CPU],
    ),
    Case(
        "bias-scan predictions",
        lambda a: [predictions(a)],
        lambda _: ["--resamples", "100"],
        stdin=True,
    ),
    Case(
        "bias-scan leaks",
        lambda a: [a.stream("text")],
        lambda a: ["--against", a.stream("messages")],
        reads="text",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        paths=("--against",),
        long=False,
    ),
    Case(
        "cf-augment write",
        lambda a: [a.stream("messages")],
        reads="messages",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        paths=("--lexicon",),
    ),
    Case(
        "corpus-build build",
        lambda a: [a.stream("text")],
        lambda a: [
            *("--rule", "c4-lorem-ipsum", "--workers", "1", "--heldout", "0.25"),
            *("--target", a.stream("text"), "--select", "0.75"),
        ],
        reads="text",
        stdin=True,
        paths=("--target", "--decontaminate", "--general"),
    ),
    Case(
        "corpus-build questions",
        lambda a: [a.stream("text")],
        lambda _: ["--kind", "definition", "--kind", "continuation"],
        reads="text",
        stdin=True,
        paths=("-m",),
    ),
    Case("corpus-build benchmark", lambda a: [corpus(a)], paths=("--general",)),
    Case("cf-augment eval", lambda a: [gold_swaps(a)], lambda _: ["--split", "all"], stdin=True),
    Case(
        "lora-tune",
        lambda a: [a.stream("prompt-completion")],
        lambda a: [
            "-m",
            a.model,
            "--heldout",
            a.stream("messages"),
            "--max-steps",
            "2",
            "--batch-size",
            "2",
            *CPU,
        ],
        reads="prompt-completion",
        paths=("-m", "--heldout"),
        stdin=True,
    ),
    Case(
        "cpt-run",
        lambda a: [a.stream("text")],
        lambda a: [
            *("-m", a.model, "--eval", a.stream("text"), "--general", a.stream("messages")),
            *("--replay", a.stream("prompt-completion"), "--tokens", "200", "--batch-size", "2"),
            *CPU,
        ],
        reads="text",
        paths=("-m", "--eval", "--general", "--replay"),
        stdin=True,
    ),
    Case(
        "vocab-extend",
        lambda a: [a.stream("text")],
        lambda a: ["-m", a.model, "--new-tokens", "20", "--min-frequency", "1", *CPU],
        reads="text",
        paths=("-m", "--heldout", "--general"),
        stdin=True,
    ),
    Case(
        "adapter-fuse train",
        lambda a: [a.stream("text")],
        lambda a: [
            *("-m", a.model, "--adapter", a.adapters[0], "--adapter", a.adapters[1]),
            *("--heldout", a.stream("messages"), *QUICK_FUSE, *CPU),
        ],
        reads="text",
        paths=("-m", "--adapter", "--heldout"),
        stdin=True,
    ),
    Case(
        "adapter-fuse report",
        lambda a: [a.stream("text")],
        lambda a: ["-m", fusion(a), *CPU],
        reads="text",
        paths=("-m",),
        stdin=True,
    ),
    Case(
        "adapter-merge",
        lambda a: [a.adapters[0]],
        lambda a: ["-m", a.model, *CPU],
        paths=("-m",),
        label="into base",
    ),
    Case(
        "adapter-merge",
        lambda a: list(a.adapters),
        lambda a: ["-m", a.model, "--method", "linear", *CPU],
        paths=("-m",),
        label="several",
    ),
    Case(
        "quantize",
        lambda a: [a.model],
        lambda a: [
            "--calibration",
            a.stream("text"),
            *("--group-size", "16", "--calibration-rows", "2", "--calibration-length", "16"),
            *CPU,
        ],
        paths=("--calibration",),
        label="gptq",
    ),
    Case("quantize", lambda a: [a.model], lambda _: ["--scheme", "int8", *CPU], label="int8"),
    Case(
        "lm-bench",
        lambda a: [a.model],
        lambda a: ["--records", a.stream("text"), *CPU],
        paths=("--records",),
    ),
    Case(
        "distill",
        lambda a: [a.stream("text")],
        lambda a: [
            "-m",
            a.model,
            "--heldout",
            a.stream("messages"),
            *("--student-layers", "1", "--top-k", "8", "--max-steps", "2", "--no-speed"),
            *CPU,
        ],
        reads="text",
        paths=("-m", "--heldout"),
        stdin=True,
    ),
    Case(
        "qat-tune",
        lambda a: [a.stream("text")],
        lambda a: [
            "-m",
            a.model,
            "--heldout",
            a.stream("messages"),
            *("--group-size", "16", "--max-steps", "2", "--batch-size", "2"),
            *CPU,
        ],
        reads="text",
        paths=("-m", "--heldout"),
        stdin=True,
    ),
    Case(
        "edge-export package",
        lambda a: [a.model],
        lambda a: [
            *("--heldout", a.stream("text"), "--scheme", "bf16", "--parity-tokens", "32", "--threads", "1"),
            *("--min-agreement", "0", "--max-kl", "100", *CPU),
        ],
        paths=("--heldout",),
    ),
    Case(
        "prune",
        lambda a: [a.stream("text")],
        lambda a: [
            "-m",
            a.model,
            "--heldout",
            a.stream("messages"),
            *("--calibration-rows", "2", "--calibration-length", "16", "--no-speed"),
            *CPU,
        ],
        reads="text",
        paths=("-m", "--heldout"),
        stdin=True,
    ),
    Case("model-card", lambda a: [a.artifact]),
    Case("chat", lambda a: [a.model], lambda _: [*CPU], makes="nothing"),
    Case("pref-collect report", lambda a: [votes(a)]),
    Case(
        "rm-train train",
        lambda a: [a.stream("preference")],
        lambda a: ["-m", a.model, "--eval-share", "0.3", *QUICK_RM, *CPU],
        reads="preference",
        paths=("-m", "--eval", "--normalise"),
        stdin=True,
    ),
    Case(
        "rm-train score",
        lambda a: [a.stream("prompt-completion")],
        lambda a: ["-m", reward_model(a), *CPU],
        reads="prompt-completion",
        makes="stream",
        output="out.jsonl",
        paths=("-m",),
        stdin=True,
    ),
    Case(
        "rm-train eval",
        lambda a: [a.stream("preference")],
        lambda a: ["-m", reward_model(a), *CPU],
        reads="preference",
        paths=("-m",),
        stdin=True,
    ),
    Case(
        "pref-tune train",
        lambda a: [a.stream("preference")],
        lambda a: [
            *("-m", a.model, "--heldout-share", "0.3", "--general", a.stream("text")),
            *("--answers", "2", "--max-new-tokens", "4", "--max-steps", "2", "--batch-size", "2", *CPU),
        ],
        reads="preference",
        paths=("-m", "--heldout", "--general", "-r"),
        stdin=True,
    ),
    Case(
        "pref-tune constitution",
        lambda a: [a.stream("prompt")],
        lambda a: [
            *("-m", a.model, "--principles", principles(a), "--unfinished", "keep"),
            *("--max-new-tokens", "6", *CPU),
        ],
        reads="prompt",
        makes="stream",
        output="out.jsonl",
        paths=("-m", "--principles", "-r"),
        stdin=True,
    ),
    Case(
        "ppo-run train",
        lambda a: [a.stream("prompt")],
        lambda a: [
            "-m",
            a.model,
            "--heldout",
            a.stream("messages"),
            "--reward",
            "builtin:length",
            *("--updates", "2", "--batch-size", "4", "--max-new-tokens", "4"),
            *CPU,
        ],
        reads="prompt",
        paths=("-m", "--heldout", "--reward"),
        stdin=True,
    ),
    Case(
        "ppo-run doctor",
        lambda a: [a.stream("prompt")],
        lambda a: ["-m", a.model, "--reward", "builtin:length", "--max-new-tokens", "4", *CPU],
        makes="nothing",
        paths=("-m", "--reward"),
    ),
    Case(
        "xl-parallel extract",
        lambda a: [pile(a, "src"), pile(a, "tgt")],
        lambda _: ["--src-lang", "en", "--tgt-lang", "xx"],
        makes="stream",
        output="out.jsonl",
        long=False,
        keeps=False,
    ),
    Case(
        "xl-parallel encoder",
        lambda a: [a.stream("parallel")],
        lambda _: ["--dim", "4"],
        reads="parallel",
        stdin=True,
        says="needs the fields src+tgt+src_lang+tgt_lang",
    ),
    Case(
        "xl-parallel align",
        lambda a: [pile(a, "src"), pile(a, "tgt")],
        lambda _: ["--src-lang", "en", "--tgt-lang", "xx"],
        makes="stream",
        output="out.jsonl",
        paths=("--dictionary", "--encoder"),
        long=False,
        keeps=False,
    ),
    Case(
        "xl-parallel mine",
        lambda a: [pile(a, "src"), pile(a, "tgt")],
        lambda a: ["--src-lang", "en", "--tgt-lang", "xx", "--encoder", sentence_encoder(a)],
        makes="stream",
        output="out.jsonl",
        paths=("--tune", "--gold"),
        long=False,
        keeps=False,
    ),
    Case(
        "xl-parallel score",
        lambda a: [a.stream("parallel")],
        lambda a: ["--encoder", sentence_encoder(a)],
        reads="parallel",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        says="needs the fields src+tgt+src_lang+tgt_lang",
    ),
    Case(
        "xl-parallel filter",
        lambda a: [a.stream("parallel")],
        lambda _: ["--no-duplicates", "--no-numbers"],
        reads="parallel",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        says="needs the fields src+tgt+src_lang+tgt_lang",
    ),
    Case(
        "xl-parallel split",
        lambda a: [a.stream("parallel")],
        lambda _: ["--split", "train=0.5,test=0.5", "--near-copies", "1"],
        reads="parallel",
        stdin=True,
        says="needs the fields src+tgt+src_lang+tgt_lang",
    ),
    Case(
        "xl-parallel codeswitch",
        lambda a: [a.stream("text")],
        lambda a: ["--dictionary", word_pairs(a), "--share", "1"],
        reads="text",
        makes="stream",
        output="out.jsonl",
        paths=("--dictionary",),
        stdin=True,
        keeps=False,
        says="field 'text'",
    ),
    Case(
        "xl-parallel backtranslate",
        lambda a: [a.stream("text")],
        lambda _: ["--from-lang", "xx", "--to-lang", "en", "--command", "rev", *CPU],
        reads="text",
        makes="stream",
        output="out.jsonl",
        stdin=True,
        keeps=False,
        says="field 'text'",
    ),
    Case(
        "guard probe",
        lambda a: [a.stream("prompt")],
        lambda a: ["-m", a.model, "--max-new-tokens", "4", *CPU],
        reads="prompt",
        makes="stream",
        output="out.jsonl",
        paths=("-m",),
        stdin=True,
    ),
    Case(
        "guard train",
        lambda a: [a.stream("unpaired")],
        lambda a: ["-m", a.model, *QUICK_GUARD, *CPU],
        reads="unpaired",
        paths=("-m", "--calibration"),
        stdin=True,
    ),
    Case(
        "guard check",
        lambda a: [a.stream("prompt-completion")],
        lambda a: ["-g", guard(a), *CPU],
        reads="prompt-completion",
        makes="stream",
        output="out.jsonl",
        paths=("-g", "-m"),
        stdin=True,
    ),
    Case(
        "guard run",
        lambda a: [a.stream("prompt")],
        lambda a: ["-g", guard(a), "--max-new-tokens", "4", *CPU],
        reads="prompt",
        makes="stream",
        output="out.jsonl",
        paths=("-g", "-m"),
        stdin=True,
    ),
    Case(
        "guard eval",
        lambda a: [a.stream("unpaired")],
        lambda a: ["-g", guard(a), "--include-seen", *CPU],
        reads="unpaired",
        paths=("-g", "-m"),
        stdin=True,
    ),
]
