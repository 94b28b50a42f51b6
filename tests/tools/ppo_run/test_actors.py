"""What the models say of a batch: padding, temperature, dropout, the reference, the first ratio."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import build_tiny_model

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from transformers import AutoModelForCausalLM

from tuneutils.shared.models import load_tokenizer
from tuneutils.shared.sample import Sampling, generate
from tuneutils.tools.ppo_run.actors import Actors, collate
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.rewards import Episode
from tuneutils.tools.ppo_run.rollout import Generation, minibatch_rows, respond, score

from .setup import CPU, actors_of, build_reward_model, episodes_of, perturb, reward_model_of

UNEVEN = [(3, 4), (17, 1), (2, 6), (5, 3), (1, 6)]
METHODS = ["full", "lora", "houlsby", "ia3", "prefix", "prompt", "llama-adapter"]


def sampled(actors: Actors, new_tokens: int = 9, **changes: object) -> tuple[list[Episode], torch.Tensor]:
    """Episodes out of one left-padded batch, with the sampler's own log-probabilities ``(B, R)``."""
    prompts = [e.prompt for e in episodes_of(UNEVEN)]
    settings = {"max_new_tokens": new_tokens, "temperature": 0.7, "seed": 3, **changes}
    made = generate(
        actors.policy,
        [p.ids for p in prompts],
        Sampling(**settings),  # type: ignore[arg-type]
        batch_size=8,
        pad_token_id=actors.pad_id,
        return_logprobs=True,
    )
    episodes = [Episode(p, tuple(c.token_ids), False, "") for p, c in zip(prompts, made, strict=True)]
    return episodes, torch.tensor([c.logprobs for c in made])


@pytest.mark.parametrize("method", METHODS)
def test_rows_3_4_and_12_sampling_and_training_see_one_distribution(method: str, tiny_model: Path) -> None:
    """Left-padded in a cache, right-padded in one pass, both at temperature 0.7: the same log-probabilities."""
    actors = actors_of(tiny_model, method=method)
    perturb(actors)
    episodes, wanted = sampled(actors)
    said = score(actors, episodes, [[0, 1, 2, 3, 4]], Processes())
    assert torch.allclose(said.logprobs, wanted, atol=2e-4)
    alone = score(actors, episodes, [[0], [1], [2], [3], [4]], Processes())
    assert torch.allclose(said.logprobs, alone.logprobs, atol=1e-5)
    assert torch.allclose(said.values, alone.values, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_row_29_the_first_ratio_is_exactly_1(method: str, tiny_model: Path) -> None:
    actors = actors_of(tiny_model, method=method)
    perturb(actors)
    episodes = episodes_of(UNEVEN)
    (rows,) = minibatch_rows([sum(x) for x in UNEVEN], 1, 2, Processes(), 0, 0)
    said = score(actors, episodes, rows, Processes())
    for chosen in rows:
        batch = collate([episodes[i] for i in chosen], actors.pad_id, said.mask.shape[1], CPU)
        logprobs, _, _ = actors.policy_logprobs(batch)
        assert torch.equal(logprobs.detach(), said.logprobs[chosen])
        assert torch.equal((logprobs.detach() - said.logprobs[chosen]).exp(), torch.ones_like(logprobs))


@pytest.mark.parametrize("method", METHODS)
def test_row_33_the_reference_is_the_model_that_training_started_from(method: str, tiny_model: Path) -> None:
    """With the adapter off, or by a frozen copy, after training as before."""
    actors = actors_of(tiny_model, method=method)
    perturb(actors, 0.1)
    assert (actors.frozen is None) == (method != "full")
    episodes = episodes_of(UNEVEN)
    said = score(actors, episodes, [[0, 1, 2, 3, 4]], Processes())
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    for i, episode in enumerate(episodes):
        ids = torch.tensor([[*episode.prompt.ids, *episode.response_ids]])
        with torch.no_grad():
            log_softmax = (base(ids).logits / 0.7).log_softmax(-1)
        start, n = len(episode.prompt.ids), len(episode.response_ids)
        for t in range(n):
            want = log_softmax[0, start + t - 1, episode.response_ids[t]].item()
            assert said.ref_logprobs[i, t].item() == pytest.approx(want, abs=1e-5)
    assert (said.logprobs - said.ref_logprobs).abs().max() > 1e-4


def test_row_18_kl_is_zero_on_pads(tiny_model: Path) -> None:
    actors = actors_of(tiny_model)
    perturb(actors)
    said = score(actors, episodes_of(UNEVEN), [[0, 1, 2, 3, 4]], Processes())
    pads = ~said.mask.bool()
    for values in (said.logprobs, said.ref_logprobs, said.values, said.entropy):
        assert values[pads].abs().max() == 0
    # Row 32: what is averaged over tokens counts the real ones.
    assert said.mask.sum().item() == sum(r for _, r in UNEVEN)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_row_10_dropout_is_off(method: str, tmp_path: Path) -> None:
    """Models whose configs ask for dropout repeat bit for bit: policy, reference, value and reward model."""
    model = build_tiny_model(tmp_path / "dropout", attention_dropout=0.5)
    reward = reward_model_of(build_reward_model(tmp_path / "rm", model, attention_dropout=0.5), model)
    actors = actors_of(model, reward, method=method, value="reward")
    perturb(actors)
    episodes = episodes_of(UNEVEN)
    first, second = (score(actors, episodes, [[0, 1, 2, 3, 4]], Processes()) for _ in range(2))
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert not torch.equal(first.logprobs, first.ref_logprobs)
    texts = [[*e.prompt.ids, *e.response_ids] for e in episodes]
    assert torch.equal(reward.scores(texts), reward.scores(texts))
    assert not any(m.training for whole in (actors.policy, actors.value) for m in whole.modules())


def test_row_11_the_models_own_generation_config_is_ignored(tmp_path: Path) -> None:
    """With top_k 1 in it the model would always give its likeliest token."""
    from transformers import GenerationConfig

    model = build_tiny_model(tmp_path / "greedy")
    GenerationConfig(do_sample=True, top_k=1, temperature=0.01).save_pretrained(model)
    actors = actors_of(model)
    how = Generation(6, 8, (3,))
    prompts = [Prompt((5, 6, 7), "", "x:1")] * 64
    episodes = respond(actors, prompts, how, 0, range(64))
    assert len({e.response_ids[0] for e in episodes}) > 30


def test_row_13_responses_end_at_the_first_stop_token(tiny_model: Path) -> None:
    """Any token may be the stop: all after it is gone, and the text that is scored has none of it."""
    actors = actors_of(tiny_model)
    prompts = [e.prompt for e in episodes_of(UNEVEN * 8)]
    free = respond(actors, prompts, Generation(30, 8, ()), 0, range(40))
    stops = (free[0].response_ids[4], 100, 120, 150)
    cut = respond(actors, prompts, Generation(30, 8, stops), 0, range(40))
    assert sum(e.finished for e in cut) > 1
    for whole, episode in zip(free, cut, strict=True):
        ends = [i for i, t in enumerate(whole.response_ids) if t in stops]
        length = ends[0] + 1 if ends else 30
        assert episode.response_ids == whole.response_ids[:length]
        assert episode.finished == bool(ends)
        text = actors.tokenizer.decode(episode.response_ids, skip_special_tokens=True)
        assert episode.completion == text


def test_row_2_pad_and_eos_that_the_policy_draws_are_tokens_like_any_other(tiny_model: Path) -> None:
    """Masks come from lengths: a pad token inside a response is scored, and EOS at its end."""
    actors = actors_of(tiny_model)
    tokenizer = load_tokenizer(str(tiny_model))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = (20, actors.pad_id, 30, int(tokenizer.eos_token_id))
    said = score(actors, [Episode(Prompt((9, 8), "", "x:1"), ids, True, "")], [[0]], Processes())
    assert said.mask.tolist() == [[1.0] * 4]
    assert (said.logprobs < 0).all()


def test_row_9_value_head_starts_at_zero(tiny_model: Path) -> None:
    said = score(actors_of(tiny_model), episodes_of(UNEVEN), [[0, 1, 2, 3, 4]], Processes())
    assert said.values.abs().max() == 0


@pytest.mark.parametrize("method", ["full", "lora"])
def test_row_9_value_starts_from_the_reward_model(method: str, tiny_model: Path, tmp_path: Path) -> None:
    """The value of the state after a text is the normalised score that the reward model gives the text."""
    model = reward_model_of(build_reward_model(tmp_path / "rm", tiny_model, mean=0.3, std=2.0), tiny_model)
    episodes = episodes_of([(4, 5), (2, 3)])
    # The state before the last token is the whole text up to it; it must end in EOS to be scored as it is.
    eos = model.eos_id
    ended = [Episode(e.prompt, (*e.response_ids[:-2], eos, e.response_ids[-1]), False, "") for e in episodes]
    wanted = model.scores([[*e.prompt.ids, *e.response_ids[:-1]] for e in ended])
    actors = actors_of(tiny_model, model, method=method, value="reward")
    said = score(actors, ended, [[0, 1]], Processes())
    found = torch.stack([said.values[i, len(e.response_ids) - 1] for i, e in enumerate(ended)])
    assert torch.allclose(found, wanted, atol=1e-5)
    # One copy of the weights serves both under an adapter, and training the value leaves the reward alone.
    perturb(actors, 0.1)
    assert torch.allclose(
        model.scores([[*e.prompt.ids, *e.response_ids[:-1]] for e in ended]), wanted, atol=1e-6
    )
    moved = score(actors, ended, [[0, 1]], Processes()).values
    assert (moved - said.values).abs().max() > 1e-3
