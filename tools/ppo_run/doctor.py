"""``ppo-run doctor``: the assertions of a correct PPO loop, on one's own model, reward and prompts.

Nothing is trained. Each check has a name, what was found, and, where it fails, what to do about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor

from tuneutils.shared.command import Run
from tuneutils.shared.device import resolve_device
from tuneutils.shared.errors import GateFailed
from tuneutils.shared.models import ModelRef
from tuneutils.shared.sample import Sampling, generate
from tuneutils.tools.ppo_run.actors import Actors, collate
from tuneutils.tools.ppo_run.advantages import (
    explained_variance,
    generalised_advantages,
    token_rewards,
    with_missing_eos,
)
from tuneutils.tools.ppo_run.diagnose import DIAGNOSES
from tuneutils.tools.ppo_run.masters import widen
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.reward_model import RewardModel
from tuneutils.tools.ppo_run.rewards import Episode
from tuneutils.tools.ppo_run.rollout import (
    SAMPLING,
    Scored,
    collect,
    minibatch_rows,
    next_prompts,
    score,
    stream_seed,
)
from tuneutils.tools.ppo_run.train import Setting, check, prepare

EPISODES = 32
#: Largest difference of two log-probabilities that rounding explains, by precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
#: Mean difference of the sampler's log-probabilities from training's that rounding explains. SmolLM2-135M
#: has 4e-6 in float32; pads that are attended to give 0.7, and a temperature of 0.707 in place of 0.7 gives
#: 0.008. In bfloat16 it has 0.04, with single tokens 0.7 apart, so this check computes in float32 there, too;
#: only 4-bit weights, which cannot be widened, get the wider tolerance.
SAMPLER_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
LARGE_REWARD = 10.0
#: Settings of a model's generation config that would truncate sampling.
TRUNCATES = {"top_k": (None, 0, 50), "top_p": (None, 1.0), "min_p": (None, 0.0), "typical_p": (None, 1.0)}


@dataclass(frozen=True)
class Finding:
    """One check: ``ok``, ``warn`` or ``fail``, and what was found."""

    name: str
    status: str
    text: str


@dataclass
class Probe:
    """A first batch of episodes and all that the models say of it."""

    setting: Setting
    params: Params
    episodes: list[Episode]
    scores: Tensor
    rows: list[list[int]]
    said: Scored


def examine(run: Run[Params]) -> dict[str, Any]:
    """Run every check and print the findings.

    Raises:
        GateFailed: a check failed (exit 1).
        ToolError: the run could not even start, for the reason given.
    """
    where = resolve_device(run.device)
    processes = Processes.join(where.type == "cpu")
    base, _, sources = check(run)
    findings = [own_pad_token(base, run.params.trust_remote_code)]
    setting = prepare(run, base, sources, processes, where)
    with setting.actors.fused():
        probe = make_probe(run, setting)
        findings += [finding for look in CHECKS for finding in look(probe)]
    failed = [f.name for f in findings if f.status == "fail"]
    summary = {"checks": [vars(f) for f in findings], "failed": failed}
    if not run.json:
        for finding in findings:
            click.echo(f"{finding.status:4}  {finding.name}: {finding.text}")
    if failed:
        if run.json:
            click.echo(json.dumps(summary, indent=2, ensure_ascii=False))
        raise GateFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")
    return summary


def make_probe(run: Run[Params], setting: Setting) -> Probe:
    """Episodes as the first update of a run would make them."""
    params = run.params
    count = min(EPISODES, params.batch_size)
    chosen = next_prompts(setting.prompts, 0, count, run.seed)
    episodes, scores, _ = collect(
        setting.actors,
        setting.reward,
        chosen,
        setting.how,
        setting.processes,
        stream_seed(run.seed, SAMPLING, 0),
    )
    lengths = [len(e.prompt.ids) + len(e.response_ids) for e in episodes]
    (rows,) = minibatch_rows(lengths, 1, setting.actors.rows, setting.processes, run.seed, 0, 0)
    said = score(setting.actors, episodes, rows, setting.processes)
    return Probe(setting, params, episodes, scores, rows, said)


def _finding(name: str, good: bool, text: str, advice: str = "", status: str = "fail") -> Finding:
    return Finding(name, "ok" if good else status, text if good or not advice else f"{text}; {advice}")


def own_pad_token(base: ModelRef, trust_remote_code: bool) -> Finding:
    """Row 2: padding is not EOS. The model's own pad token is looked at, before ours is put in its place."""
    from transformers import AutoTokenizer

    from tuneutils.shared.models import load_tokenizer

    used = load_tokenizer(base, trust_remote_code=trust_remote_code)
    if base.kind == "gguf":
        return Finding("pad-token", "ok", f"pads with {used.pad_token!r}")
    own = AutoTokenizer.from_pretrained(
        base.path, revision=base.revision, trust_remote_code=trust_remote_code
    )
    if own.pad_token_id is None:
        return Finding("pad-token", "warn", f"the model has no pad token; {used.pad_token!r} is used")
    if own.pad_token_id == own.eos_token_id:
        text = f"the model pads with its EOS token {own.eos_token!r}; {used.pad_token!r} is used instead"
        return Finding("pad-token", "warn", text)
    return Finding("pad-token", "ok", f"pads with {own.pad_token!r}, which is not EOS {own.eos_token!r}")


def generation_config(probe: Probe) -> Iterator[Finding]:
    """Row 11: the model's own sampling settings would bias the ratio; they are not used."""
    config = getattr(probe.setting.actors.policy, "generation_config", None)
    cut = {
        k: getattr(config, k, None) for k, plain in TRUNCATES.items() if getattr(config, k, None) not in plain
    }
    shown = ", ".join(f"{k}={v}" for k, v in cut.items())
    yield Finding(
        "generation-config",
        "ok",
        f"{shown} of the model's own is ignored" if cut else "nothing truncates sampling",
    )


def repeatable(probe: Probe) -> Iterator[Finding]:
    """Rows 10 and 29: the same forward pass twice is equal to the last bit, so the first ratio is 1."""
    actors = probe.setting.actors
    worst = 0.0
    width = probe.said.mask.shape[1]
    for rows in probe.rows:
        batch = collate([probe.episodes[i] for i in rows], actors.pad_id, width, actors.where)
        logprobs = actors.policy_logprobs(batch)[0].detach().float().cpu()
        worst = max(worst, float((logprobs - probe.said.logprobs[rows]).abs().max()))
    found = f"first probability ratio is 1 to within {worst:.1e}"
    if worst > 0:
        found = f"two passes over the same batch differ by up to {worst:.1e} in log-probability"
    yield _finding("ratio", worst == 0.0, found, DIAGNOSES["ratio"][1])


def sampler_agrees(probe: Probe) -> Iterator[Finding]:
    """Rows 3, 4 and 12: left-padded sampling and right-padded training see one distribution."""
    actors = in_float32(probe.setting.actors)
    sampling = Sampling(
        max_new_tokens=probe.params.max_new_tokens,
        temperature=actors.temperature,
        stop_token_ids=probe.setting.how.stop_ids,
        seed=0,
    )
    with actors.autocast():
        completions = generate(
            actors.policy,
            [e.prompt.ids for e in probe.episodes],
            sampling,
            batch_size=probe.setting.how.batch_size,
            pad_token_id=actors.pad_id,
            return_logprobs=True,
        )
    episodes = [
        Episode(e.prompt, tuple(c.token_ids), False, "")
        for e, c in zip(probe.episodes, completions, strict=True)
    ]
    everything = [list(range(i, min(i + 8, len(episodes)))) for i in range(0, len(episodes), 8)]
    said = score(actors, episodes, everything, Processes())
    differences = [
        abs(ours - theirs)
        for row, c in zip(said.logprobs.tolist(), completions, strict=True)
        for ours, theirs in zip(row, c.logprobs or [], strict=False)
    ]
    mean = sum(differences) / len(differences)
    yield _finding(
        "sampler",
        mean <= SAMPLER_TOLERANCE.get(actors.dtype, 0.1),
        f"log-probabilities of sampling and training differ by {mean:.1e} a token, "
        f"at most {max(differences):.1e}",
        "temperature, positions or padding differ between them",
    )


def in_float32(actors: Actors) -> Actors:
    """The same policy in float32, where rounding hides no fault; 4-bit weights stay as they are.

    Its own weights are widened in place, so nothing may look at them in their precision afterwards.
    """
    four_bit = any(hasattr(p, "quant_state") for p in actors.policy.parameters())
    if actors.dtype == torch.float32 or four_bit:
        return actors
    widen(actors.policy.parameters())
    actors.policy.float()
    return replace(actors, dtype=torch.float32)


def reference_is_start(probe: Probe) -> Iterator[Finding]:
    """Rows 16 and 33: the reference is the model that training starts from."""
    worst = float((probe.said.logprobs - probe.said.ref_logprobs).abs().max())
    virtual = probe.setting.actors.needs_mask
    yield _finding(
        "reference",
        worst <= TOLERANCE.get(probe.setting.actors.dtype, 0.5),
        f"policy and reference differ by at most {worst:.1e} a token at the start",
        "the method's random start already changes the model" if virtual else "they are not the same model",
        "warn" if virtual else "fail",
    )


def reward_varies(probe: Probe) -> Iterator[Finding]:
    """A reward that is constant teaches nothing; one that is large drowns the KL penalty and the value."""
    mean, spread = float(probe.scores.mean()), float(probe.scores.std(correction=0))
    count = len(probe.scores)
    yield _finding(
        "constant-reward",
        spread > 1e-9 * max(1.0, abs(mean)),
        f"reward of {count} responses: mean {mean:.4g}, std {spread:.4g}",
        "it is constant, so there is nothing to learn from",
    )
    yield _finding(
        "reward-scale",
        max(abs(mean), spread) <= LARGE_REWARD,
        f"mean {mean:.4g} and std {spread:.4g}",
        "scale it to a std of about 1, or the value model and --kl-coef will not fit it",
        "warn",
    )


def read_out(probe: Probe) -> Iterator[Finding]:
    """Row 5: a reward model's score does not depend on padding."""
    model = probe.setting.reward
    if not isinstance(model, RewardModel):
        return
    rows = [[*e.prompt.ids, *e.response_ids] for e in probe.episodes[:8]]
    together = model.scores(rows)
    alone = torch.cat([model.scores([row]) for row in rows])
    worst = float((together - alone).abs().max())
    fits = worst <= (1e-4 if probe.setting.actors.dtype == torch.float32 else 0.1)
    yield _finding(
        "read-out",
        fits,
        f"scores with and without padding differ by at most {worst:.1e}",
        "the reward model looks at padding: it must be causal, and read at the EOS that closes the text",
    )


def score_kept(probe: Probe) -> Iterator[Finding]:
    """Rows 15, 16 and 18: each token's reward is its KL penalty, and the score is added on the last token."""
    said, beta = probe.said, probe.params.kl_coef
    found = token_rewards(probe.scores, said.logprobs, said.ref_logprobs, said.mask, beta)
    wanted = -beta * (said.logprobs - said.ref_logprobs)
    for row, (episode, score_of) in enumerate(zip(probe.episodes, probe.scores, strict=True)):
        wanted[row, len(episode.response_ids) - 1] += score_of
    worst = float((found - wanted).abs().max())
    fits = worst <= 1e-4 * max(1.0, float(probe.scores.abs().max()))
    yield _finding(
        "score-position",
        fits,
        f"token rewards are the score on the last token less the KL to within {worst:.1e}",
        "pads are counted, or the response mask does not end at the last token",
    )


def responses_end(probe: Probe) -> Iterator[Finding]:
    """Rows 13 and 14: some responses end by themselves."""
    ended = sum(e.finished for e in probe.episodes)
    text = (
        f"{ended} of {len(probe.episodes)} responses end in EOS within {probe.params.max_new_tokens} tokens"
    )
    yield _finding("eos", ended > 0, text, "raise --max-new-tokens, or fine-tune the model to stop", "warn")


def value_starts_sane(probe: Probe) -> Iterator[Finding]:
    """Row 9: the value model's first guesses are no worse than guessing nothing at all."""
    said, params = probe.said, probe.params
    finished = torch.tensor([e.finished for e in probe.episodes])
    scores = with_missing_eos(probe.scores, finished, params.missing_eos, params.missing_eos_penalty)
    rewards = token_rewards(scores, said.logprobs, said.ref_logprobs, said.mask, params.kl_coef)
    _, returns = generalised_advantages(rewards, said.values, said.mask, gamma=params.gamma, lam=1.0)
    found = explained_variance(said.values, returns, said.mask)
    yield _finding(
        "value",
        found >= -1.0,
        f"explained variance {found:.2f} at the start",
        DIAGNOSES["explained-variance"][1],
        "warn",
    )


CHECKS: tuple[Callable[[Probe], Iterator[Finding]], ...] = (
    generation_config,
    repeatable,
    reference_is_start,
    reward_varies,
    read_out,
    score_kept,
    responses_end,
    value_starts_sane,
    sampler_agrees,  # the last: it widens the policy
)
