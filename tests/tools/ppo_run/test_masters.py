"""Weights held as bfloat16 and a remainder: nothing is lost, and training is that of float32 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import Result, build_tiny_model

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tuneutils.shared.command import Run
from tuneutils.shared.fused_ops import RMSNorm
from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.tools.ppo_run.actors import Actors, build_actors
from tuneutils.tools.ppo_run.checkpoint import load_trainable, trainable_tensors
from tuneutils.tools.ppo_run.masters import SplitAdam, exact, join, narrow, split, widen
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rollout import score

from .setup import CPU, build_reward_model, episodes_of, params_of, reward_model_of

UNEVEN = [(3, 4), (17, 1), (2, 6), (5, 3), (1, 6)]


def actors_in_bfloat16(model: Path, reward: Path | None = None) -> Actors:
    run = Run("ppo-run train", params_of(model, method="full"), device="cpu", dtype="bfloat16")
    base = resolve(str(model))
    scorer = None if reward is None else reward_model_of(reward, model)
    torch.manual_seed(0)
    return build_actors(run, base, load_tokenizer(base), CPU, torch.bfloat16, "Say this.", scorer)


def test_split_is_nearest_and_join_its_exact_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    wide = bits.to(torch.int32).view(torch.float32)
    wide = wide[wide.abs() < 3e38]  # no NaN, and nothing that rounds to infinity
    ties = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, -1.01171875])
    for given in (wide, ties):
        high, low = split(given)
        assert torch.equal(join(high, low).view(torch.int32), given.view(torch.int32))
        error = (high.double() - given.double()).abs()
        assert (error <= (given.bfloat16().double() - given.double()).abs()).all()


def test_adam_is_torchs_but_for_the_rounding_of_its_first_moment() -> None:
    torch.manual_seed(0)
    wide = [torch.nn.Parameter(torch.randn(600, 700)), torch.nn.Parameter(torch.randn(9))]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in wide]
    start = [p.detach().clone() for p in wide]
    narrow(ours[:1])
    optimizers = [
        kind(group, lr=1e-3, eps=1e-5) for kind, group in ((torch.optim.Adam, wide), (SplitAdam, ours))
    ]
    for _ in range(20):
        for theirs, own in zip(wide, ours, strict=True):
            theirs.grad = torch.randn_like(theirs) + 0.2
            own.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for theirs, own, before in zip(wide, ours, start, strict=True):
        moved = (theirs - before).norm()
        assert (exact(own) - theirs).norm() < 2**-8 * moved


def test_small_steps_are_not_lost() -> None:
    """A step of 1e-5 on a weight of 1 is below bfloat16's resolution, and adds up all the same."""
    parameter = torch.nn.Parameter(torch.ones(3))
    narrow([parameter])
    optimizer = SplitAdam([parameter], lr=1e-5, eps=1e-5)
    for _ in range(100):
        parameter.grad = torch.full((3,), -1.0)
        optimizer.step()
    assert exact(parameter).tolist() == pytest.approx([1.001] * 3, rel=1e-5)
    widen([parameter])
    assert parameter.dtype == torch.float32
    assert parameter.tolist() == pytest.approx([1.001] * 3, rel=1e-5)


def test_gradients_of_micro_batches_are_added_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    narrow([parameter])
    for value in (256.0, 0.5, 0.5):
        (parameter * torch.tensor(value, dtype=torch.bfloat16)).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.item() == 257.0


def test_rows_29_and_33_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    """The first ratio is 1 and the KL from the reference 0, to the last bit; both are near float32's."""
    reward = build_reward_model(tmp_path / "rm", tiny_model)
    actors = actors_in_bfloat16(tiny_model, reward)
    episodes = episodes_of(UNEVEN)
    with actors.fused():
        said, again = (score(actors, episodes, [[0, 1, 2, 3, 4]], Processes()) for _ in range(2))
    assert torch.equal(said.logprobs, again.logprobs)
    assert torch.equal(said.logprobs, said.ref_logprobs)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for i, episode in enumerate(episodes):
        ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids]])
        with torch.no_grad():
            log_softmax = (base(ids).logits / 0.7).log_softmax(-1)
        for t, token in enumerate(episode.response_ids):
            wanted = log_softmax[0, len(episode.prompt.ids) + t - 1, token].item()
            assert said.logprobs[i, t].item() == pytest.approx(wanted, abs=0.05)


def test_what_is_kept_is_float32(tiny_model: Path) -> None:
    actors = actors_in_bfloat16(tiny_model)
    before = load_file(tiny_model / "model.safetensors")
    kept = trainable_tensors(actors)
    for name, tensor in before.items():
        assert torch.equal(kept[f"weight.policy.{name}"], tensor.float()), name
    changed = {k: v + 1e-4 for k, v in kept.items()}
    load_trainable(actors, changed)
    found = trainable_tensors(actors)
    assert all(torch.equal(found[k], v) for k, v in changed.items())


def test_a_full_run_in_bfloat16_writes_float32_weights(
    ppo: Callable[..., Result], prompts: Path, tiny_model: Path
) -> None:
    sizes = ["--updates", "1", "--batch-size", "8", "--max-new-tokens", "6"]
    done = ppo(prompts, "-r", "builtin:length", "--method", "full", "--dtype", "bfloat16", *sizes)
    assert done.code == 0, done.stderr
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(Path("out") / "model.safetensors")
    assert {t.dtype for t in after.values()} == {torch.float32}
    changes = [(after[n] - before[n].float()).abs() for n in after]
    assert 0 < max(c.max().item() for c in changes) < 1e-3


def test_the_norms_weight_gets_its_gradient() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((2, 3, 8), (8,)))
    assert torch.autograd.gradcheck(lambda *t: RMSNorm.apply(*t, 1e-5), (x, weight))
    torch.testing.assert_close(RMSNorm.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5))


def test_fused_full_training_gives_the_models_own_gradients(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    actors = actors_in_bfloat16(model)
    widen(actors.policy.parameters())
    actors.dtype = torch.float32
    ids = torch.arange(10, 34).view(2, 12)
    made = []
    for fuse in (False, True):
        if fuse:
            with actors.fused():
                actors.policy(ids).logits.float().log_softmax(-1)[..., 7].sum().backward()
        else:
            actors.policy(ids).logits.float().log_softmax(-1)[..., 7].sum().backward()
        made.append({n: p.grad.clone() for n, p in actors.policy.named_parameters()})
        actors.policy.zero_grad()
    for name, wanted in made[0].items():
        assert (made[1][name] - wanted).norm() < 1e-5 * wanted.norm() + 1e-8, name
