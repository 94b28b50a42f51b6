"""Policies side by side on prompts that none was trained on: reward, gold reward, win rate, KL, forgetting.

The first policy is the one that the others started from. Every policy draws with the same seeds. The gold
reward is one that nothing was optimised against: where the reward rises and the gold reward falls, the
reward is over-optimised (Gao et al. 2023, arXiv 2210.10760). Best-of-n answers of the first policy, picked
by the reward, show what reward and gold reward cost in KL without any training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads
from tuneutils.shared.record_source import open_source

import torch  # isort: skip

from tuneutils.shared.artifact import describe_input
from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device, resolve_dtype
from tuneutils.shared.errors import ExitCode, ToolError
from tuneutils.shared.evaluate_model import perplexity_items, record_sequence
from tuneutils.shared.logprobs_model import sequence_logprobs
from tuneutils.shared.models import Loaded, context_length, load_model, model_input, resolve
from tuneutils.shared.records import Reader
from tuneutils.shared.sample import Sampling, generate
from tuneutils.tools.ppo_run import comparison
from tuneutils.tools.ppo_run.actors import collate
from tuneutils.tools.ppo_run.compare_params import CompareParams
from tuneutils.tools.ppo_run.comparison import Answers, Compared
from tuneutils.tools.ppo_run.prompts import FORMATS, Prompt, read_prompts
from tuneutils.tools.ppo_run.reward_model import check_same_tokenizer, load_reward_model
from tuneutils.tools.ppo_run.reward_text import check_same_template
from tuneutils.tools.ppo_run.rewards import Episode, Reward, kind_of, reward_input, text_reward
from tuneutils.tools.ppo_run.rollout import HELDOUT, stream_seed


def compare(run: Run[CompareParams]) -> dict[str, Any]:
    """Run ``ppo-run compare``; gives the summary.

    Raises:
        ToolError: bad input, with its place; nothing is written then.
    """
    params = run.params
    policies = [_labelled(given) for given in run.inputs]
    labels = [label for label, _ in policies]
    for label in labels:
        if labels.count(label) > 1:
            raise ToolError(
                f"two policies are called {label!r}; name them with NAME=PATH", code=ExitCode.USAGE
            )
    source = open_source(run, [params.prompts], "prompts", formats=FORMATS)
    rewards = {"reward": params.reward} | ({"gold": params.gold} if params.gold else {})
    inputs = [model_input(path) for _, path in policies] + source.inputs
    for name, spec in rewards.items():
        inputs += [replace(found, role=name) for found in reward_input(spec)]
    if params.general:
        inputs.append(describe_input("general", params.general))
    with run.artifact("report", inputs) as art:
        first = _load(run, policies[0][1])
        contexts = [context_length(resolve(path)) for _, path in policies]
        contexts += [context_length(resolve(s)) for s in rewards.values() if kind_of(s) == "model"]
        known = [c for c in contexts if c is not None]
        prompts = read_prompts(run, source, first.tokenizer, min(known, default=None))  # type: ignore[arg-type]
        made = _measure(run, policies, first, prompts[: params.limit], rewards)
        report = comparison.build(made, run.seed)
        art.metrics.update(comparison.metrics(report))
        comparison.write(Path(art.dir), report, made, params.samples, run.log)
    run.log.info("%s", comparison.to_text(report))
    return {"output": run.output, "metrics": art.metrics}


def _labelled(given: str) -> tuple[str, str]:
    label, equals, path = given.partition("=")
    if equals and not Path(given).exists():
        return label, path
    return Path(given).resolve().name if Path(given).exists() else Path(given).name, given


def _load(run: Run[CompareParams], path: str) -> Loaded:
    return load_model(
        path, device=run.device, dtype=run.dtype, trust_remote_code=run.params.trust_remote_code
    )


def _measure(
    run: Run[CompareParams],
    policies: Sequence[tuple[str, str]],
    first: Loaded,
    prompts: list[Prompt],
    rewards: dict[str, str],
) -> Compared:
    params = run.params
    answers, many = [], []
    steps = len(policies) + bool(params.best_of) + len(rewards)
    with run.progress(steps, "compare", "steps") as bar:
        for i, (label, path) in enumerate(policies):
            loaded = first if i == 0 else _load(run, path)
            _check_tokenizer(path, loaded, first)
            answers.append(_answers(run, label, loaded, first, prompts))
            bar.update()
        if params.best_of:
            repeated = [p for p in prompts for _ in range(params.best_of)]
            many = _respond(run, first, repeated)
            bar.update()
        tokenizer = first.tokenizer
        del loaded, first
        best_of: dict[str, list[list[float]]] = {}
        for name, spec in rewards.items():
            reward = _reward(run, spec, tokenizer)
            for one in answers:
                one.scores[name] = reward(one.episodes)
            if many:
                flat = reward(many)
                best_of[name] = [flat[i : i + params.best_of] for i in range(0, len(flat), params.best_of)]
            del reward
            bar.update()
    return Compared(prompts, answers, best_of)


def _check_tokenizer(path: str, loaded: Loaded, first: Loaded) -> None:
    try:
        check_same_tokenizer(path, loaded.tokenizer, first.tokenizer)
    except ToolError as exc:
        raise ToolError(
            f"{path}: has another tokenizer than {first.ref.given}; KL needs policies over the same tokens"
        ) from exc


def _answers(
    run: Run[CompareParams], label: str, loaded: Loaded, first: Loaded, prompts: list[Prompt]
) -> Answers:
    episodes = _respond(run, loaded, prompts)
    own = _logprobs(run, loaded, episodes)
    before = own if loaded is first else _logprobs(run, first, episodes)
    kl = [a - b for a, b in zip(own, before, strict=True)]
    made = Answers(label, episodes, kl)
    if run.params.general:
        made.general = _general(run, loaded, run.params.general)
    run.log.info("%s: KL %.3f nats, %.1f tokens", label, math.fsum(kl) / len(kl), _mean_length(episodes))
    return made


def _mean_length(episodes: Sequence[Episode]) -> float:
    return sum(len(e.response_ids) for e in episodes) / len(episodes)


def _respond(run: Run[CompareParams], loaded: Loaded, prompts: Sequence[Prompt]) -> list[Episode]:
    """One answer to each prompt; the draws of row i are the same for every policy."""
    sampling = Sampling(
        max_new_tokens=run.params.max_new_tokens,
        temperature=run.params.temperature,
        stop_token_ids=(int(loaded.tokenizer.eos_token_id),),
        seed=stream_seed(run.seed, HELDOUT),
    )
    made = generate(
        loaded.model,
        [p.ids for p in prompts],
        sampling,
        batch_size=run.params.batch_size,
        pad_token_id=loaded.pad_id,
    )
    decode = loaded.tokenizer.decode
    return [
        Episode(
            p, tuple(c.token_ids), c.finish_reason == "stop", decode(c.token_ids, skip_special_tokens=True)
        )
        for p, c in zip(prompts, made, strict=True)
    ]


@torch.no_grad()
def _logprobs(run: Run[CompareParams], loaded: Loaded, episodes: Sequence[Episode]) -> list[float]:
    """Summed log-probability of each answer at the temperature of sampling."""
    virtual = any(c.is_prompt_learning for c in getattr(loaded.model, "peft_config", {}).values())
    made = [0.0] * len(episodes)
    for rows in _by_length(episodes, run.params.batch_size):
        batch = collate(
            [episodes[i] for i in rows], loaded.pad_id, 1, loaded.device
        )  # columns of answers are not used
        mask = batch.attention_mask if virtual else None
        found = sequence_logprobs(
            loaded.model, batch.input_ids, mask, batch.response_mask, run.params.temperature
        )
        for i, value in zip(rows, found.double().sum(1).tolist(), strict=True):
            made[i] = value
    return made


def _by_length(episodes: Sequence[Episode], size: int) -> Iterator[list[int]]:
    order = sorted(
        range(len(episodes)), key=lambda i: (len(episodes[i].prompt.ids) + len(episodes[i].response_ids), i)
    )
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _general(run: Run[CompareParams], loaded: Loaded, path: str) -> list[dict[str, float]]:
    reader = Reader([path], on_error=run.on_error)
    sequences = []
    for item in reader.located():
        try:
            sequences.append(record_sequence(item.record, loaded.tokenizer, run.params.template))
        except ValueError as exc:
            reader.refuse(item, str(exc))
    return perplexity_items(loaded, sequences, max_length=run.params.max_length)


def _reward(run: Run[CompareParams], spec: str, tokenizer: Any) -> Reward:
    params = run.params
    if kind_of(spec) != "model":
        return text_reward(spec, timeout_s=params.reward_timeout, retries=params.reward_retries)
    check_same_template(spec, params.template, tokenizer)
    where = resolve_device(run.device)
    return load_reward_model(
        spec,
        tokenizer,
        where,
        resolve_dtype(run.dtype, where),
        batch_size=params.batch_size,
        trust_remote_code=params.trust_remote_code,
    )
