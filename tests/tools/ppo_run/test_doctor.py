"""The doctor finds what it should, and nothing on a healthy setting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Result, build_tiny_model
from transformers import AutoTokenizer, GenerationConfig

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip

from tuneutils.shared.command import Run
from tuneutils.shared.logprobs_model import unwrap
from tuneutils.tools.ppo_run.actors import Actors
from tuneutils.tools.ppo_run.doctor import (
    Finding,
    Probe,
    make_probe,
    read_out,
    reference_is_start,
    repeatable,
    sampler_agrees,
    score_kept,
    value_starts_sane,
)
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rewards import Reward
from tuneutils.tools.ppo_run.rollout import Generation
from tuneutils.tools.ppo_run.train import Setting

from .setup import actors_of, build_reward_model, episodes_of, params_of, perturb, reward_model_of

Check = Callable[[Probe], Iterator[Finding]]
STOPS = tuple(range(100, 160))


def statuses(done: Result) -> dict[str, str]:
    return {c["name"]: c["status"] for c in json.loads(done.stdout)["checks"]}


def test_a_healthy_setting(
    ppo: Callable[..., Result], prompts: Path, tiny_model: Path, workdir: Path
) -> None:
    folder = build_reward_model(workdir / "rm", tiny_model)
    before = sorted(workdir.iterdir())
    done = ppo(prompts, "-r", folder, "--json", "--max-new-tokens", "90", command="doctor")
    assert done.code == 0, done.stderr
    found = statuses(done)
    assert "fail" not in found.values()
    assert {
        "pad-token",
        "ratio",
        "sampler",
        "reference",
        "constant-reward",
        "read-out",
        "eos",
    } <= found.keys()
    assert sorted(workdir.iterdir()) == before
    shown = ppo(prompts, "-r", folder, command="doctor").stdout
    assert "ok    ratio: first probability ratio is 1 to within 0.0e+00" in shown


def test_a_constant_reward(ppo: Callable[..., Result], prompts: Path) -> None:
    Path("flat_reward2.py").write_text("def score(prompts, completions): return [0.5] * len(prompts)\n")
    done = ppo(prompts, "-r", "flat_reward2:score", "--json", command="doctor")
    assert done.code == 1
    assert "checks failed: constant-reward" in done.error
    assert statuses(done)["constant-reward"] == "fail"


def test_pad_is_eos_and_a_truncating_generation_config(
    ppo: Callable[..., Result], prompts: Path, tmp_path: Path
) -> None:
    model = build_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model)
    GenerationConfig(do_sample=True, top_k=5, top_p=0.8).save_pretrained(model)
    done = ppo(prompts, "-r", "builtin:length:3", command="doctor", model=model)
    assert done.code == 0, done.stderr
    assert "warn  pad-token: the model pads with its EOS token '<|im_end|>'; '<|pad|>' is used" in done.stdout
    assert "top_k=5, top_p=0.8 of the model's own is ignored" in done.stdout


def test_a_reward_out_of_scale(ppo: Callable[..., Result], prompts: Path) -> None:
    Path("large_reward.py").write_text(
        "def score(prompts, completions): return [1000.0 * len(c) for c in completions]\n"
    )
    done = ppo(prompts, "-r", "large_reward:score", command="doctor")
    assert done.code == 0, done.stderr
    assert "warn  reward-scale: " in done.stdout


def test_responses_that_never_end(ppo: Callable[..., Result], prompts: Path) -> None:
    done = ppo(prompts, "-r", "builtin:length", "--max-new-tokens", "1", command="doctor")
    assert "warn  eos: 0 of 6 responses end in EOS within 1 tokens" in done.stdout


class TestFinds:
    """Each check fails where what it watches over is broken in the models themselves."""

    @staticmethod
    def probe(actors: Actors, reward: Reward | None = None) -> Probe:
        params = params_of(Path("m"), batch_size=5, max_new_tokens=6)
        run = Run("ppo-run doctor", params, device="cpu", dtype="float32")
        prompts = [e.prompt for e in episodes_of([(3, 1), (17, 1), (2, 1), (5, 1), (9, 1)])]
        scorer = reward or (lambda episodes: [float(e.response_ids[0] % 5) for e in episodes])
        setting = Setting(actors, scorer, prompts, [], Generation(6, 8, STOPS), Processes())
        return make_probe(run, setting)

    @staticmethod
    def only(check: Check, probe: Probe) -> Finding:
        (finding,) = check(probe)
        return finding

    def test_nothing_on_sound_models(self, tiny_model: Path) -> None:
        probe = self.probe(actors_of(tiny_model))
        for check in (repeatable, sampler_agrees, reference_is_start, score_kept, value_starts_sane):
            finding = self.only(check, probe)
            assert finding.status == "ok", finding

    def test_row_10_dropout(self, tiny_model: Path) -> None:
        actors = actors_of(tiny_model)
        for module in actors.policy.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        actors.policy.train()
        finding = self.only(repeatable, self.probe(actors))
        assert finding.status == "fail"
        assert re.search(r"two passes over the same batch differ by up to .* dropout", finding.text)

    @pytest.mark.parametrize("method", ["lora", "full"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_row_12_another_temperature_in_sampling(
        self, dtype: torch.dtype, method: str, tiny_model: Path
    ) -> None:
        """By one per cent, which bfloat16's rounding would hide."""
        actors = actors_of(tiny_model, dtype=dtype, method=method)
        probe = self.probe(actors)
        assert self.only(sampler_agrees, probe).status == "ok"

        def warmer(_module: Any, _args: Any, output: Any) -> Any:
            output.logits = output.logits / 1.01
            return output

        unwrap(actors.policy).register_forward_hook(warmer)
        finding = self.only(sampler_agrees, probe)
        assert finding.status == "fail"
        assert "temperature" in finding.text

    @pytest.mark.parametrize("broken", ["attention_mask", "position_ids"])
    def test_rows_3_and_4_padding_and_positions(self, broken: str, tiny_model: Path) -> None:
        """Pads that are attended to, and positions that are all alike, in the sampler alone."""
        actors = actors_of(tiny_model)
        perturb(actors, 0.3)  # a fresh model hardly attends to anything
        probe = self.probe(actors)
        assert self.only(sampler_agrees, probe).status == "ok"

        def spoil(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            given = kwargs.get(broken)
            if given is None:
                return args, kwargs
            fixed = torch.ones_like(given) if broken == "attention_mask" else torch.zeros_like(given)
            return args, {**kwargs, broken: fixed}

        actors.policy.get_decoder().register_forward_pre_hook(spoil, with_kwargs=True)
        finding = self.only(sampler_agrees, probe)
        assert finding.status == "fail"
        assert "positions or padding differ" in finding.text

    def test_row_16_a_reference_that_is_another_model(self, tiny_model: Path) -> None:
        actors = actors_of(tiny_model)
        perturb(actors, 0.05)
        finding = self.only(reference_is_start, self.probe(actors))
        assert finding.status == "fail"
        assert "not the same model" in finding.text

    @pytest.mark.parametrize("broken", ["the mask ends too early", "pads count"])
    def test_rows_15_and_18_score_off_the_last_token(self, broken: str, tiny_model: Path) -> None:
        probe = self.probe(actors_of(tiny_model))
        row = next(i for i, e in enumerate(probe.episodes) if 1 < len(e.response_ids) < 6)
        end = len(probe.episodes[row].response_ids)
        if broken == "pads count":
            probe.said.logprobs[row, end] = -3.0
        else:
            probe.said.mask[row, end - 1] = 0
        assert self.only(score_kept, probe).status == "fail"

    def test_row_5_a_reward_model_that_sees_padding(self, tiny_model: Path, tmp_path: Path) -> None:
        model = reward_model_of(build_reward_model(tmp_path / "rm", tiny_model), tiny_model)
        actors = actors_of(tiny_model, model)
        probe = self.probe(actors, model)
        assert self.only(read_out, probe).status == "ok"

        def mix(_module: Any, _args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, True)
            return output

        model.trunk.register_forward_hook(mix)
        finding = self.only(read_out, probe)
        assert finding.status == "fail"
        assert "looks at padding" in finding.text

    def test_row_9_a_value_head_that_guesses_wildly(self, tiny_model: Path) -> None:
        actors = actors_of(tiny_model)
        torch.nn.init.normal_(actors.value.head.weight, std=20.0)
        finding = self.only(value_starts_sane, self.probe(actors))
        assert finding.status == "warn"
        assert "--value-learning-rate" in finding.text

    def test_row_33_a_method_whose_start_moves_the_model(
        self, ppo: Callable[..., Result], prompts: Path
    ) -> None:
        """Virtual tokens drawn at random are no other reference: a warning, and not a failure."""
        done = ppo(prompts, "-r", "builtin:length", "--method", "prompt", "--json", command="doctor")
        assert statuses(done)["reference"] == "warn"
