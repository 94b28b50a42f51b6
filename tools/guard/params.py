"""The parameters of ``guard``'s subcommands; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option

TEMPLATES = ("auto", "chat", "none")


@dataclass(frozen=True, kw_only=True)
class ProbeParams:
    model: str = option(help="The model to probe: artifact, folder, adapter or Hub id.", short="-m")
    limit: int | None = option(
        None, help="Only the first N probes of each category, of harmless requests and of others.", min=1
    )
    max_new_tokens: int = option(48, help="Longest reply, in tokens.", min=1)
    temperature: float = option(0.0, help="Divisor of the logits; 0 is greedy.", min=0)
    batch_size: int = option(32, help="Prompts that are completed at once.", min=1)
    template: str = option(
        "auto", help="Put string prompts into the chat template: if there is one, always, never.",
        choices=TEMPLATES,
    )  # fmt: skip
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    model: str = option(help="The model to guard: artifact, folder, adapter or Hub id.", short="-m")
    budget: float = option(
        0.05, help="Share of harmless exchanges that may be flagged.", min=0.0001, max=0.9999
    )
    escalate: float = option(
        0.25, help="Share of harmless exchanges that the first layer hands to the second.", min=0, max=1
    )
    calibration: str | None = option(
        None, help="Records to set the threshold on; by default --calibration-share of the groups.",
        metavar="FILE",
    )  # fmt: skip
    calibration_share: float = option(
        0.3, help="Share of the groups that is kept for the threshold.", min=0.01, max=0.9
    )
    label: str = option("label", help="Field that is true where the reply is acceptable.", metavar="FIELD")
    fails_above: float | None = option(
        None, help="The label is a score of how bad a reply is; above this it is a failure."
    )
    layers: str = option(
        "auto", help="Decoder blocks to try, from 1; auto takes five over the depth.", metavar="N,..."
    )
    pooling: str = option(
        "auto", help="How activations are pooled up to a token; auto tries all.",
        choices=("auto", "last", "mean", "ema", "prompt-mean"),
    )  # fmt: skip
    folds: int = option(4, help="Folds of the cross-validation that chooses among them.", min=2)
    max_new_tokens: int = option(48, help="Longest reply to a probe, in tokens.", min=1)
    max_length: int = option(1024, help="Longest exchange, in tokens; a prompt loses its start.", min=2)
    batch_size: int = option(32, help="Probes that are completed at once.", min=1)
    template: str = option(
        "auto", help="Put string prompts into the chat template: if there is one, always, never.",
        choices=TEMPLATES,
    )  # fmt: skip
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class CheckParams:
    guard: str = option(help="The guard: an artifact of guard train.", short="-g")
    model: str | None = option(None, help="The guarded model; the guard's own, if not given.", short="-m")
    flagged: str = option(
        "mark", help="Flagged records: mark them, leave them out, or put --message for the reply.",
        choices=("mark", "drop", "replace"),
    )  # fmt: skip
    message: str = option("I cannot help with that.", help="What stands for a flagged reply.")
    personal_data: str = option(
        "mark", help="E-mail, IBAN, card, phone and the like: count, mask, flag where a reply has some, off.",
        choices=("mark", "mask", "flag", "off"),
    )  # fmt: skip
    presidio: bool = option(False, help="Look for personal data with Presidio too, names among it.")
    latency: bool = option(
        False, help="Add the milliseconds that each record took; the output is another at each run."
    )
    batch_size: int = option(16, help="Exchanges of one forward pass.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class RunParams:
    guard: str = option(help="The guard: an artifact of guard train.", short="-g")
    model: str | None = option(None, help="The model; the guard's own, if not given.", short="-m")
    max_new_tokens: int = option(128, help="Longest reply, in tokens.", min=1)
    temperature: float = option(0.0, help="Divisor of the logits; 0 is greedy.", min=0)
    top_p: float = option(1.0, help="Keep the likeliest tokens of this share.", min=0.001, max=1)
    flagged: str = option(
        "replace", help="A reply that turns: put --message in its place, or keep what came before.",
        choices=("replace", "cut"),
    )  # fmt: skip
    message: str = option("I cannot help with that.", help="What stands for a flagged reply.")
    personal_data: str = option(
        "mask", help="Personal data in the reply: mask, count, off.", choices=("mask", "mark", "off")
    )
    batch_size: int = option(8, help="Prompts that are completed at once.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")


@dataclass(frozen=True, kw_only=True)
class EvalParams:
    guard: str = option(help="The guard: an artifact of guard train.", short="-g")
    model: str | None = option(None, help="The guarded model; the guard's own, if not given.", short="-m")
    label: str = option("label", help="Field that is true where the reply is acceptable.", metavar="FIELD")
    fails_above: float | None = option(
        None, help="The label is a score of how bad a reply is; above this it is a failure."
    )
    include_seen: bool = option(
        False, help="Measure on templates and prompts that the guard was trained on, too."
    )
    min_recall: float | None = option(None, help="Exit 1 when the recall is below this.", min=0, max=1)
    max_false_positives: float | None = option(
        None, help="Exit 1 when more harmless exchanges than this share are flagged.", min=0, max=1
    )
    batch_size: int = option(16, help="Exchanges of one forward pass.", min=1)
    trust_remote_code: bool = option(False, help="Run code that the model's folder brings along.")
