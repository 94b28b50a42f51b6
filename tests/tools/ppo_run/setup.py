"""Actors and episodes without the command line, for tests that look inside one update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from transformers import LlamaConfig, LlamaForSequenceClassification

from tuneutils.shared.artifact import write_json
from tuneutils.shared.command import Run
from tuneutils.shared.device import dtype_name
from tuneutils.shared.models import load_tokenizer, resolve
from tuneutils.tools.ppo_run.actors import Actors, build_actors
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.reward_model import RewardModel, load_reward_model
from tuneutils.tools.ppo_run.rewards import Episode

CPU = torch.device("cpu")


def params_of(model: Path, **changes: Any) -> Params:
    return Params(**{"model": str(model), "reward": "builtin:length", "temperature": 0.7, **changes})


def actors_of(
    model: Path,
    reward_model: RewardModel | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Actors:
    """The actors of a run with these parameters on the CPU."""
    run = Run("ppo-run train", params_of(model, **changes), device="cpu", dtype=dtype_name(dtype))
    base = resolve(str(model))
    torch.manual_seed(0)
    return build_actors(run, base, load_tokenizer(base), CPU, dtype, "Say this.", reward_model)


def perturb(actors: Actors, scale: float = 0.02, seed: int = 1) -> None:
    """Move everything that is trained, as updates would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in actors.trainable().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def episodes_of(lengths: Sequence[tuple[int, int]], seed: int = 0, vocabulary: int = 300) -> list[Episode]:
    """Random token ids: prompts and responses of the given lengths, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, vocabulary, (count,), generator=generator).tolist())

    return [Episode(Prompt(draw(p), "", f"x:{i}"), draw(r), False, "") for i, (p, r) in enumerate(lengths)]


def build_reward_model(
    folder: Path, policy: Path, *, mean: float = 0.0, std: float = 1.0, seed: int = 5, **config: Any
) -> Path:
    """A random reward model for the tokenizer of ``policy``, as rm-train leaves it."""
    tokenizer = load_tokenizer(str(policy))
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(LlamaConfig(**{**fields, **config}))
        torch.nn.init.normal_(model.score.weight, std=1 / 5)  # row 6: 1/√(d + 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    normalisation = {"mean": mean, "std": std}
    write_json(
        folder / "artifact.json",
        {"schema": 1, "kind": "reward-model", "reward_normalisation": normalisation, "files": {}},
    )
    return folder


def reward_model_of(folder: Path, policy: Path) -> RewardModel:
    return load_reward_model(str(folder), load_tokenizer(str(policy)), CPU, torch.float32)
