"""The parameters of ``ppo-run compare``; options, schema and manifest come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from tuneutils.shared.command import option


@dataclass(frozen=True, kw_only=True)
class CompareParams:
    """What the policies answer, and by what the answers are judged."""

    prompts: str = option(help="Prompts that none of the policies was trained on.")
    reward: str = option(
        help="The reward that was learnt from: an rm-train artifact, builtin:NAME[:NUMBER], a Python "
        "module:function, or an http(s) URL.",
        short="-r",
    )
    gold: str | None = option(
        None, help="A second reward that nothing learnt from, such as a reward model of other data."
    )
    general: str | None = option(None, help="General text; bits per byte on it show what was forgotten.")
    limit: int | None = option(None, help="Only the first prompts.", min=1)
    best_of: int = option(
        0, help="Answers to each prompt by the first policy for its best-of-n curve; 0 for none.", min=0
    )
    samples: int = option(5, help="Prompts whose answers the report shows side by side.", min=0)
    max_new_tokens: int = option(53, help="Tokens of an answer, EOS included.", min=1)
    temperature: float = option(0.7, help="Of sampling, and of the log-probabilities in KL.", min=1e-3)
    template: str = option(
        "auto",
        help="Put string prompts into the chat template: if there is one, always, never.",
        choices=("auto", "chat", "none"),
    )
    too_long: str = option(
        "error",
        help="A prompt that leaves no room for the answer is a bad record, or is dropped.",
        choices=("error", "drop"),
    )
    max_length: int = option(1024, help="Tokens of general text that a model sees at once.", min=2)
    batch_size: int = option(32, help="Rows generated or scored at once.", min=1)
    reward_timeout: float = option(
        30.0, help="Seconds to wait for a reward over HTTP.", min=0, role="runtime"
    )
    reward_retries: int = option(3, help="Further tries of a reward over HTTP.", min=0, role="runtime")
    trust_remote_code: bool = option(False, help="Run code that a model's folder brings along.")
