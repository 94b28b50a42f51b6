"""Proximal policy optimisation of a language model, from top to bottom.

Ouyang et al. 2022 (InstructGPT), section 3.5, with the details of Huang et al. 2024 (N+, arXiv 2403.17031):
an episode is a response; each token is an action; the reward is a KL penalty on every token and the score on
the last one; advantages by GAE; clipped policy and value losses over a few passes of each batch.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor, nn

from tuneutils.shared.command import Run
from tuneutils.shared.errors import ToolError
from tuneutils.tools.ppo_run.actors import Actors, collate, learning_rates
from tuneutils.tools.ppo_run.advantages import (
    adapted_kl_coef,
    explained_variance,
    generalised_advantages,
    masked_mean,
    token_rewards,
    whiten,
    with_missing_eos,
)
from tuneutils.tools.ppo_run.checkpoint import Progress
from tuneutils.tools.ppo_run.losses import is_clipped, policy_loss, value_loss
from tuneutils.tools.ppo_run.masters import SplitAdam, is_narrow
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.rewards import Episode, Reward
from tuneutils.tools.ppo_run.rollout import (
    SAMPLING,
    Generation,
    Scored,
    collect,
    minibatch_rows,
    next_prompts,
    score,
    stream_seed,
    trim_heap,
)
from tuneutils.tools.ppo_run.workers import Turns


def make_optimizer(actors: Actors, params: Params) -> torch.optim.Adam:
    """Adam with one group for the policy and one for the value model."""
    groups = []
    for part, rate in zip(("policy", "value"), learning_rates(params), strict=True):
        own = [p for name, p in actors.trainable().items() if name.startswith(part + ".")]
        groups.append({"params": own, "lr": rate, "first_lr": rate})
    narrow = any(is_narrow(p) for p in actors.trainable().values())
    return (SplitAdam if narrow else torch.optim.Adam)(groups, eps=params.adam_epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer, params: Params, update: int) -> float:
    """The rate of this update: from its first value linearly towards 0, or constant; gives the policy's."""
    share = 1.0 - update / params.updates if params.schedule == "linear" else 1.0
    for group in optimizer.param_groups:
        group["lr"] = share * group["first_lr"]
    return float(optimizer.param_groups[0]["lr"])


def one_update(
    run: Run[Params],
    actors: Actors,
    optimizer: torch.optim.Adam,
    reward: Reward,
    prompts: list[Prompt],
    how: Generation,
    processes: Processes,
    progress: Progress,
) -> tuple[dict[str, Any], list[Episode], Tensor]:
    """Collect a batch of episodes and learn from it; gives the metrics, the episodes and their scores."""
    params, update = run.params, progress.update
    chosen = next_prompts(prompts, progress.episodes, params.batch_size, run.seed)
    started = time.monotonic()
    episodes, scores, reward_s = collect(
        actors, reward, chosen, how, processes, stream_seed(run.seed, SAMPLING, update)
    )
    collected = time.monotonic() - reward_s
    lengths = [len(e.prompt.ids) + len(e.response_ids) for e in episodes]
    passes = [
        minibatch_rows(lengths, params.minibatches, actors.rows, processes, run.seed, update, epoch)
        for epoch in range(params.ppo_epochs)
    ]
    old = score(actors, episodes, [rows for step in passes[0] for rows in step], processes)
    scored = time.monotonic()
    trim_heap()

    finished = torch.tensor([e.finished for e in episodes])
    penalised = with_missing_eos(scores, finished, params.missing_eos, params.missing_eos_penalty)
    rewards = token_rewards(penalised, old.logprobs, old.ref_logprobs, old.mask, progress.kl_coef)
    kl = (old.logprobs - old.ref_logprobs).sum(1).mean().item()
    metrics: dict[str, Any] = {
        "update": update + 1,
        "episodes": progress.episodes + len(episodes),
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "penalised_reward": penalised.mean().item(),
        "objective": rewards.sum(1).mean().item(),
        "kl": kl,
        "kl_coef": progress.kl_coef,
        "entropy": masked_mean(old.entropy, old.mask).item(),
        "length": old.mask.sum(1).mean().item(),
        "finished": finished.float().mean().item(),
    }
    if params.kl_budget is not None and kl > params.kl_budget:
        return metrics | {"stopped": "kl_budget"}, episodes, scores

    if params.whiten_rewards:
        rewards = whiten(rewards, old.mask, shift_mean=False)
    advantages, returns = generalised_advantages(
        rewards, old.values, old.mask, gamma=params.gamma, lam=params.gae_lambda
    )
    metrics["explained_variance"] = explained_variance(old.values, returns, old.mask)
    if params.whiten_advantages:  # after the returns are formed, which are not whitened
        advantages = whiten(advantages, old.mask)

    metrics["learning_rate"] = set_learning_rate(optimizer, params, update)
    metrics |= improve(actors, optimizer, params, episodes, old, advantages, returns, passes, processes)
    if params.kl_target is not None:
        progress.kl_coef = adapted_kl_coef(
            progress.kl_coef, kl, params.kl_target, len(episodes), params.kl_horizon
        )
    progress.seconds = {
        "rollout_s": collected - started,
        "scoring_s": scored - collected,
        "update_s": time.monotonic() - scored,
    }
    return metrics, episodes, scores


def improve(
    actors: Actors,
    optimizer: torch.optim.Adam,
    params: Params,
    episodes: list[Episode],
    old: Scored,
    advantages: Tensor,
    returns: Tensor,
    passes: list[list[list[list[int]]]],
    processes: Processes,
) -> dict[str, float]:
    """All passes over one batch; gives the means of their metrics over real tokens.

    Args:
        advantages, returns: ``(B, R)``.
        passes: for each pass, for each minibatch, this process's rows in micro-batches.
    """
    parameters = list(actors.trainable().values())
    token_counts = old.mask.sum(1)
    batch_tokens = float(token_counts.sum())
    sums = torch.zeros(4, dtype=torch.float64)
    first_deviation = 0.0
    norms = []
    turns = Turns(parameters)

    def learn(numbered: tuple[int, list[int]], tokens: float) -> tuple[Tensor, float]:
        number, rows = numbered
        with turns.pass_number(number):
            return accumulate(actors, params, episodes, old, advantages, returns, rows, tokens)

    for epoch, minibatches in enumerate(passes):
        all_rows = processes.together_raw(minibatches)
        for step, micro_batches in enumerate(minibatches):
            # One mean over the tokens of the whole minibatch, whatever the processes and micro-batches.
            tokens = sum(float(token_counts[rows].sum()) for own in all_rows for rows in own[step])
            optimizer.zero_grad()
            turns.restart()
            with turns.held():
                learnt = actors.workers.map(partial(learn, tokens=tokens), list(enumerate(micro_batches)))
            for totals, deviation in learnt:
                sums += totals
                if epoch == 0 and step == 0:
                    first_deviation = max(first_deviation, deviation)
            processes.sum_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, params.max_grad_norm or float("inf"))
            if not torch.isfinite(norm):
                raise ToolError(
                    f"the gradient's norm is {norm.item()}; try a lower --learning-rate or --dtype float32"
                )
            norms.append(norm.item())
            optimizer.step()
    optimizer.zero_grad()
    means = [s / (len(passes) * batch_tokens) for s in processes.sum(sums.tolist())]
    deviations = processes.together_raw(first_deviation)
    return {
        "policy_loss": means[0],
        "value_loss": means[1],
        "approx_kl": means[2],
        "clip_fraction": means[3],
        "grad_norm": sum(norms) / len(norms),
        "first_ratio_deviation": max(deviations),
    }


def accumulate(
    actors: Actors,
    params: Params,
    episodes: list[Episode],
    old: Scored,
    advantages: Tensor,
    returns: Tensor,
    rows: list[int],
    tokens: float,
) -> tuple[Tensor, float]:
    """Add one micro-batch's gradient; gives sums over its tokens and the ratio's largest distance from 1.

    The sums ``(4,)``: policy loss, value loss, approximate KL from the old policy, clipped tokens.
    """
    width = old.mask.shape[1]
    batch = collate([episodes[i] for i in rows], actors.pad_id, width, actors.where)
    old_logprobs, old_values, adv, ret = (
        t[rows].to(actors.where) for t in (old.logprobs, old.values, advantages, returns)
    )
    logprobs, values, _ = actors.policy_logprobs(batch)
    policy_terms = policy_loss(logprobs, old_logprobs, adv, params.clip_range) * batch.mask
    loss = policy_terms.sum() / tokens
    if values is None:  # a model of its own: its activations come when the policy's are gone
        loss.backward()  # type: ignore[no-untyped-call]
        values, loss = actors.trunk_values(batch), loss.new_zeros(())
    value_terms = value_loss(values, old_values, ret, params.value_clip_range) * batch.mask
    (loss + params.value_coef * value_terms.sum() / tokens).backward()
    with torch.no_grad():
        difference = (logprobs - old_logprobs) * batch.mask
        clipped = is_clipped(logprobs, old_logprobs, adv, params.clip_range) * batch.mask
        # E_old[r - 1 - log r], an estimate of KL(old || new) without bias and never negative (k3).
        approx_kl = (torch.expm1(difference) - difference) * batch.mask
        sums = torch.stack([t.sum().double() for t in (policy_terms, value_terms, approx_kl, clipped)])
        deviation = float(torch.expm1(difference).abs().max())
    return sums.cpu(), deviation
