"""One update from its prompts to its metrics, against everything computed again, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from torch import Tensor

from tuneutils.shared.command import Run
from tuneutils.tools.ppo_run.actors import Actors
from tuneutils.tools.ppo_run.checkpoint import Progress
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.ppo import improve, make_optimizer, one_update
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rewards import Episode
from tuneutils.tools.ppo_run.rollout import Generation, minibatch_rows

from .setup import actors_of, episodes_of, params_of, perturb
from .test_update import UNEVEN, prepared

STOPS = tuple(range(90, 140))


def reward(episodes: Sequence[Episode]) -> list[float]:
    return [sum(e.response_ids) % 7 / 2.0 for e in episodes]


def of_tokens(actors: Actors, episode: Episode) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, the reference's, entropies and values, each of a response's own tokens, unpadded."""
    ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids]])
    at = torch.arange(len(episode.prompt.ids), ids.shape[1])
    output = actors.policy(ids, output_hidden_states=True)
    with torch.no_grad(), actors.policy.disable_adapter():
        reference = (actors.policy(ids).logits / 0.7).log_softmax(-1)
    said = (output.logits / 0.7).log_softmax(-1)
    entropy = -(said.exp() * said).sum(-1)[0, at - 1]
    values = actors.value.head(output.hidden_states[-1])[0, at - 1, 0]
    return said[0, at - 1, ids[0, at]], reference[0, at - 1, ids[0, at]], entropy, values


def wanted(actors: Actors, params: Params, episodes: list[Episode], scores: list[float]) -> dict[str, Any]:
    """The metrics of an update of one pass by lists and sums; leaves its gradients in the weights."""
    found = [of_tokens(actors, e) for e in episodes]
    tokens = sum(len(e.response_ids) for e in episodes)
    penalised = [
        s if e.finished or params.missing_eos == "none" else s - params.missing_eos_penalty
        for e, s in zip(episodes, scores, strict=True)
    ]
    kls = [(lp - ref).tolist() for lp, ref, *_ in found]
    rewards = [[-params.kl_coef * k for k in kl] for kl in kls]
    for row, score in zip(rewards, penalised, strict=True):
        row[-1] += score
    objective = sum(map(sum, rewards)) / len(rewards)
    if params.whiten_rewards:
        mean = sum(map(sum, rewards)) / tokens
        std = math.sqrt(sum((r - mean) ** 2 for row in rewards for r in row) / tokens)
        rewards = [[(r - mean) / std + mean for r in row] for row in rewards]
    advantages, returns = [], []
    for row, (*_, values) in zip(rewards, found, strict=True):
        v = [*values.tolist(), 0.0]
        delta = [row[t] + params.gamma * v[t + 1] - v[t] for t in range(len(row))]
        decay = params.gamma * params.gae_lambda
        a = [sum(decay ** (s - t) * delta[s] for s in range(t, len(row))) for t in range(len(row))]
        advantages.append(a)
        returns.append([x + y for x, y in zip(a, v, strict=False)])
    flat_values = [v for *_, values in found for v in values.tolist()]
    flat_returns = [r for row in returns for r in row]
    left = [r - v for r, v in zip(flat_returns, flat_values, strict=True)]
    if params.whiten_advantages:
        mean = sum(map(sum, advantages)) / tokens
        std = math.sqrt(sum((a - mean) ** 2 for row in advantages for a in row) / tokens)
        advantages = [[(a - mean) / std for a in row] for row in advantages]
    policy, value = torch.zeros(()), torch.zeros(())
    for (lp, _, _, values), a, ret in zip(found, advantages, returns, strict=True):
        policy = policy - ((lp - lp.detach()).exp() * torch.tensor(a)).sum() / tokens
        value = value + 0.5 * ((values - torch.tensor(ret)) ** 2).sum() / tokens
    (policy + params.value_coef * value).backward()
    norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in actors.trainable().values()))
    return {
        "reward": sum(scores) / len(scores),
        "reward_std": torch.tensor(scores).std(correction=0).item(),
        "penalised_reward": sum(penalised) / len(scores),
        "objective": objective,
        "kl": sum(map(sum, kls)) / len(kls),
        "entropy": sum(entropy.sum().item() for _, _, entropy, _ in found) / tokens,
        "length": tokens / len(episodes),
        "finished": sum(e.finished for e in episodes) / len(episodes),
        "explained_variance": 1
        - torch.tensor(left).var(correction=0).item() / torch.tensor(flat_returns).var(correction=0).item(),
        "policy_loss": policy.item(),
        "value_loss": value.item(),
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "grad_norm": norm,
        "first_ratio_deviation": 0.0,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"whiten_rewards": True, "whiten_advantages": False, "missing_eos": "none"},
        {"gamma": 0.9, "gae_lambda": 0.6, "kl_coef": 0.5, "missing_eos_penalty": 3.0, "value_coef": 2.0},
        {"whiten_advantages": False, "kl_target": 0.1, "kl_horizon": 100},
    ],
)
def test_an_update_is_what_its_options_say(changes: dict[str, Any], tiny_model: Path) -> None:
    """Rows 14 to 16, 19 to 22, 26, 30 and 32 where they meet: the loop heeds each option, in the right order.

    Responses differ in length, so that a mean that took pads in would be another.
    """
    params = params_of(
        tiny_model, ppo_epochs=1, minibatches=1, batch_size=7, updates=4, max_new_tokens=9, **changes
    )
    actors = actors_of(tiny_model, micro_batch_size=2)
    perturb(actors, 0.05)
    run = Run("ppo-run train", params, device="cpu", dtype="float32")
    prompts = [e.prompt for e in episodes_of(UNEVEN)]
    optimizer = make_optimizer(actors, params)
    progress = Progress(kl_coef=params.kl_coef, update=1)
    before = {n: p.detach().clone() for n, p in actors.trainable().items()}
    metrics, episodes, scores = one_update(
        run, actors, optimizer, reward, prompts, Generation(9, 8, STOPS), Processes(), progress
    )
    rate = optimizer.param_groups[0]["first_lr"]
    assert len({len(e.response_ids) for e in episodes}) > 2
    assert 0 < sum(e.finished for e in episodes) < 7
    with torch.no_grad():
        for name, parameter in actors.trainable().items():
            parameter.copy_(before[name])
            parameter.grad = None
    expected = wanted(actors, params, episodes, scores.tolist())
    assert scores.tolist() == reward(episodes)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    assert metrics["learning_rate"] == pytest.approx(0.75 * rate)  # row 26: the second of four updates
    assert metrics["kl_coef"] == params.kl_coef
    adapted = params.kl_coef
    if params.kl_target is not None:
        adapted *= 1 + min(max(expected["kl"] / 0.1 - 1, -0.2), 0.2) * 7 / 100
        assert adapted != params.kl_coef
    assert progress.kl_coef == pytest.approx(adapted)


def test_row_32_metrics_are_means_over_real_tokens(tiny_model: Path) -> None:
    """Approximate KL (k3), clip fraction and losses after the weights have moved, token by token."""
    actors = actors_of(tiny_model, method="full")
    params = params_of(tiny_model, method="full", learning_rate=0.0, value_learning_rate=0.0, clip_range=0.05)
    episodes = episodes_of([*UNEVEN, (2, 40)])  # in a batch as wide as the last, most places are pads
    old, advantages, returns = prepared(actors, episodes)
    perturb(actors, 0.02)
    passes = [minibatch_rows([1] * len(episodes), 2, 2, Processes(), 0, 0, epoch) for epoch in range(2)]
    metrics = improve(
        actors,
        make_optimizer(actors, params),
        params,
        episodes,
        old,
        advantages,
        returns,
        passes,
        Processes(),
    )
    sums = dict.fromkeys(("policy_loss", "value_loss", "approx_kl", "clip_fraction"), 0.0)
    first_minibatch = {i for rows in passes[0][0] for i in rows}
    first = 0.0
    for i, episode in enumerate(episodes):
        ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids]])
        start = len(episode.prompt.ids)
        with torch.no_grad():
            output = actors.policy(ids, output_hidden_states=True)
            said = (output.logits / 0.7).log_softmax(-1)
            values = actors.value.head(output.hidden_states[-1])[0, :, 0]
        for t, token in enumerate(episode.response_ids):
            log_ratio = said[0, start + t - 1, token].item() - old.logprobs[i, t].item()
            ratio, a = math.exp(log_ratio), advantages[i, t].item()
            clipped = min(max(ratio, 0.95), 1.05)
            v, v_old, ret = values[start + t - 1].item(), old.values[i, t].item(), returns[i, t].item()
            near = v_old + min(max(v - v_old, -0.2), 0.2)
            sums["policy_loss"] += max(-a * ratio, -a * clipped)
            sums["value_loss"] += 0.5 * max((v - ret) ** 2, (near - ret) ** 2)
            sums["approx_kl"] += ratio - 1 - log_ratio
            sums["clip_fraction"] += -a * clipped > -a * ratio
            if i in first_minibatch:
                first = max(first, abs(ratio - 1))
    tokens = sum(len(e.response_ids) for e in episodes)
    assert 0 < sums["clip_fraction"] < tokens
    for name, total in sums.items():
        assert metrics[name] == pytest.approx(total / tokens, rel=1e-3, abs=1e-7), name
    assert metrics["first_ratio_deviation"] == pytest.approx(first, rel=1e-3)


def test_row_27_four_passes_in_one_minibatch_unless_said_otherwise(tiny_model: Path) -> None:
    """N+, table 7; and an optimiser step for each minibatch of each pass."""
    plain = params_of(tiny_model)
    assert (plain.ppo_epochs, plain.minibatches) == (4, 1)
    actors = actors_of(tiny_model)
    params = params_of(tiny_model, ppo_epochs=3, minibatches=2, batch_size=4, max_new_tokens=4)
    optimizer = make_optimizer(actors, params)
    run = Run("ppo-run train", params, device="cpu", dtype="float32")
    prompts = [e.prompt for e in episodes_of(UNEVEN)]
    progress = Progress(kl_coef=params.kl_coef)
    one_update(run, actors, optimizer, reward, prompts, Generation(4, 8, STOPS), Processes(), progress)
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}
