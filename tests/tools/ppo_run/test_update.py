"""The losses and gradients of one update, against autograd on formulas written out, and TRL's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tuneutils.tools.ppo_run.actors import Actors, collate
from tuneutils.tools.ppo_run.advantages import generalised_advantages, token_rewards, whiten
from tuneutils.tools.ppo_run.ppo import accumulate, improve, make_optimizer
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rewards import Episode
from tuneutils.tools.ppo_run.rollout import Scored, minibatch_rows, score

from .setup import CPU, actors_of, build_reward_model, episodes_of, params_of, perturb, reward_model_of

UNEVEN = [(3, 4), (7, 1), (2, 6), (5, 3), (1, 6)]
EVEN = [(4, 6)] * 5


def gradients(actors: Actors) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in actors.trainable().items() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = max(grad.abs().max().item(), 1e-6)
        assert (found[name] - grad).abs().max().item() < 1e-4 * scale + 1e-7, name


def prepared(actors: Actors, episodes: list[Episode]) -> tuple[Scored, Tensor, Tensor]:
    """A batch as it was scored, with advantages and returns, before the weights moved."""
    old = score(actors, episodes, [[i] for i in range(len(episodes))], Processes())
    scores = torch.linspace(-1, 2, len(episodes))
    rewards = token_rewards(scores, old.logprobs, old.ref_logprobs, old.mask, 0.05)
    advantages, returns = generalised_advantages(rewards, old.values, old.mask, gamma=1.0, lam=0.95)
    return old, whiten(advantages, old.mask), returns


@pytest.mark.parametrize("value", ["policy", "reward"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_is_that_of_the_textbook(method: str, value: str, tiny_model: Path, tmp_path: Path) -> None:
    """Rows 23 to 25: clipped losses, token by token in Python, averaged over all tokens, by autograd."""
    reward_model = None
    if value == "reward":
        reward_model = reward_model_of(build_reward_model(tmp_path / "rm", tiny_model), tiny_model)
    actors = actors_of(tiny_model, reward_model, method=method, value=value)
    perturb(actors, 0.01, seed=3)
    params = params_of(tiny_model, method=method, value=value, clip_range=0.05, value_clip_range=0.05)
    episodes = episodes_of(UNEVEN)
    old, advantages, returns = prepared(actors, episodes)
    perturb(actors, 0.01)
    tokens = old.mask.sum().item()
    for rows in ([0, 2], [4], [1, 3]):
        accumulate(actors, params, episodes, old, advantages, returns, rows, tokens)
    found = gradients(actors)
    for parameter in actors.trainable().values():
        parameter.grad = None

    total = torch.zeros(())
    clipped = 0
    for i, episode in enumerate(episodes):
        ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids]])
        if value == "policy":
            output = actors.policy(ids, output_hidden_states=True)
            hidden = output.hidden_states[-1]
        else:
            output = actors.policy(ids)
            hidden = actors.value.trunk(ids).last_hidden_state  # type: ignore[union-attr]
        log_softmax = (output.logits / 0.7).log_softmax(-1)
        values = actors.value.head(hidden)[0, :, 0]
        start = len(episode.prompt.ids)
        for t, token in enumerate(episode.response_ids):
            ratio = (log_softmax[0, start + t - 1, token] - old.logprobs[i, t]).exp()
            a = advantages[i, t]
            total = total + torch.max(-a * ratio, -a * ratio.clamp(0.95, 1.05))
            clipped += int(-a * ratio.clamp(0.95, 1.05) > -a * ratio)
            v, v_old, ret = values[start + t - 1], old.values[i, t], returns[i, t]
            near = v_old + (v - v_old).clamp(-0.05, 0.05)
            total = total + 0.1 * 0.5 * torch.max((v - ret) ** 2, (near - ret) ** 2)
    (total / tokens).backward()
    assert 0 < clipped < tokens, "the test must reach both branches"
    assert_same(found, gradients(actors))


def trl_loss(
    actors: Actors, episodes: list[Episode], old: Scored, scores: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Policy and value loss as TRL 1.12.0's ``PPOTrainer.train`` computes them (ppo_trainer.py, 735–847).

    For responses without padding; there its score stands on the last token, as it does here.
    """
    logr = old.ref_logprobs - old.logprobs
    rewards = -kl_coef * -logr
    rewards[:, -1] += scores
    lastgaelam: Tensor | float = 0
    reversed_advantages = []
    length = rewards.shape[1]
    for t in reversed(range(length)):
        nextvalues = old.values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + 1.0 * nextvalues - old.values[:, t]
        lastgaelam = delta + 1.0 * 0.95 * lastgaelam
        reversed_advantages.append(lastgaelam)
    advantages = torch.stack(reversed_advantages[::-1], axis=1)  # type: ignore[call-overload]
    returns = advantages + old.values
    advantages = (advantages - advantages.mean()) * torch.rsqrt(advantages.var() + 1e-8)
    ids = torch.tensor([[*e.prompt.ids, *e.response_ids] for e in episodes])
    context_length = len(episodes[0].prompt.ids)
    output = actors.policy(ids, output_hidden_states=True)
    logits = output.logits[:, context_length - 1 : -1] / (0.7 + 1e-7)
    new_logprobs = logits.log_softmax(-1).gather(2, ids[:, context_length:, None])[..., 0]
    vpred = actors.value.head(output.hidden_states[-1])[:, context_length - 1 : -1].squeeze(-1)
    vpredclipped = torch.clamp(vpred, old.values - 0.2, old.values + 0.2)
    vf_loss = 0.5 * torch.max(torch.square(vpred - returns), torch.square(vpredclipped - returns)).mean()
    ratio = torch.exp(new_logprobs - old.logprobs)
    pg_losses = -advantages * ratio
    pg_losses2 = -advantages * torch.clamp(ratio, 0.8, 1.2)
    return torch.max(pg_losses, pg_losses2).mean(), vf_loss


def test_update_is_that_of_trl(tiny_model: Path) -> None:
    """But for TRL's sample variance in whitening: ours is the population's, whose std on the mask is 1."""
    actors = actors_of(tiny_model, method="full")
    params = params_of(tiny_model, method="full")
    perturb(actors, 0.01, seed=3)
    episodes = episodes_of(EVEN)
    old, advantages, returns = prepared(actors, episodes)
    perturb(actors, 0.02)
    count = old.mask.sum().item()
    trl_advantages = advantages * ((count - 1) / count) ** 0.5
    sums, _ = accumulate(actors, params, episodes, old, trl_advantages, returns, [0, 1, 2, 3, 4], count)
    found = gradients(actors)
    for parameter in actors.trainable().values():
        parameter.grad = None
    pg_loss, vf_loss = trl_loss(actors, episodes, old, torch.linspace(-1, 2, 5), 0.05)
    (pg_loss + 0.1 * vf_loss).backward()
    assert sums[0].item() / count == pytest.approx(pg_loss.item(), abs=1e-5)
    assert sums[1].item() / count == pytest.approx(vf_loss.item(), rel=1e-5)
    assert_same(found, gradients(actors))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_row_25_the_mean_is_over_all_tokens_of_the_window(micro_batch_size: int, tiny_model: Path) -> None:
    """Micro-batches of very different lengths give the gradient, and so the step, of one batch."""
    made = []
    for size in (micro_batch_size, 100):
        actors = actors_of(tiny_model, method="full")
        params = params_of(tiny_model, method="full", learning_rate=1e-3, max_grad_norm=0.0)
        episodes = episodes_of(UNEVEN)
        old, advantages, returns = prepared(actors, episodes)
        passes = [
            minibatch_rows([sum(x) for x in UNEVEN], 2, size, Processes(), 0, 0, epoch) for epoch in range(2)
        ]
        optimizer = make_optimizer(actors, params)
        metrics = improve(actors, optimizer, params, episodes, old, advantages, returns, passes, Processes())
        made.append((metrics, {n: p.detach().clone() for n, p in actors.trainable().items()}))
    (small, weights), (whole, wanted) = made
    assert small == pytest.approx(whole, rel=1e-3, abs=1e-5)
    for name, weight in wanted.items():
        assert torch.allclose(weights[name], weight, atol=2e-5), name


def test_row_17_the_loss_has_no_kl_term(tiny_model: Path) -> None:
    """The KL acts through the reward alone: the reference's log-probabilities never reach the loss."""
    actors = actors_of(tiny_model, method="full")
    episodes = episodes_of(UNEVEN)
    old, advantages, returns = prepared(actors, episodes)
    made = []
    for reference in (old.ref_logprobs, old.ref_logprobs - 3.0):
        other = Scored(old.logprobs, reference, old.values, old.entropy, old.mask)
        accumulate(actors, params_of(tiny_model), episodes, other, advantages, returns, [0, 1], 9.0)
        made.append(gradients(actors))
        for parameter in actors.trainable().values():
            parameter.grad = None
    for name, grad in made[0].items():
        assert torch.equal(grad, made[1][name])


def test_row_26_optimiser(tiny_model: Path) -> None:
    actors = actors_of(tiny_model, method="full")
    optimizer = make_optimizer(actors, params_of(tiny_model, method="full"))
    assert type(optimizer) is torch.optim.Adam
    assert [(g["eps"], g["lr"]) for g in optimizer.param_groups] == [(1e-5, 3e-6), (1e-5, 1e-4)]


def test_row_27_each_pass_has_a_shuffle_of_its_own() -> None:
    lengths = [1] * 40
    passes = [minibatch_rows(lengths, 4, 5, Processes(), 7, 3, epoch) for epoch in range(4)]
    sets = [[tuple(sorted(i for rows in step for i in rows)) for step in one] for one in passes]
    assert all(sorted(i for step in one for i in step) == list(range(40)) for one in sets)
    assert len({tuple(one) for one in sets}) == 4
    assert passes[1] == minibatch_rows(lengths, 4, 5, Processes(), 7, 3, 1)
    assert passes[1] != minibatch_rows(lengths, 4, 5, Processes(), 8, 3, 1)


def test_row_28_processes_share_the_shuffle() -> None:
    """The rows of a minibatch are the same set however many processes share them."""
    lengths = [(i * 7) % 13 for i in range(30)]
    one = minibatch_rows(lengths, 3, 4, Processes(), 0, 1, 2)
    two = [minibatch_rows(lengths, 3, 4, Processes(rank, 2), 0, 1, 2) for rank in range(2)]
    for step in range(3):
        shared = sorted(i for own in two for rows in own[step] for i in rows)
        assert shared == sorted(i for rows in one[step] for i in rows)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_row_34_logits_of_a_whole_batch_never_exist(tmp_path: Path) -> None:
    from support import build_tiny_model

    vocabulary = 60_000
    model = build_tiny_model(tmp_path / "wide", vocab_size=vocabulary, hidden_size=16, num_attention_heads=2)
    actors = actors_of(model, method="lora")
    episodes = episodes_of([(10, 100)] * 8)
    batch = collate(episodes, 1, 100, CPU)
    with Largest() as forward:
        logprobs, values, _ = actors.policy_logprobs(batch)
        (logprobs.sum() + values.sum()).backward()
        with torch.no_grad():
            actors.policy_logprobs(batch, with_entropy=True)
        with actors.reference_in_place():
            actors.reference_logprobs(batch)
    weights = vocabulary * 16
    chunk = (32 << 20) // 4
    assert forward.elements <= max(weights, chunk) < 8 * 100 * vocabulary / 5
