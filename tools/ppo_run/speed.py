"""How near a run is to what the machine can do: work that each phase needs, and the machine's own rates.

The rates are measured on the spot, on a CPU alone. Only work that the algorithm needs is counted, nothing
that is done twice to save memory and no padding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import nn

from tuneutils.shared.logprobs_model import unwrap
from tuneutils.tools.ppo_run.actors import Actors, TrunkValue
from tuneutils.tools.ppo_run.params import Params
from tuneutils.tools.ppo_run.reward_model import RewardModel
from tuneutils.tools.ppo_run.rewards import Episode

ROWS = 1024
READ_BYTES = 1 << 26


@dataclass(frozen=True)
class Rates:
    """Of this machine: matrix products of the model's own shapes, and reading memory."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Size:
    """Weights of a model's linear layers: how many are frozen, are trained, and are the output projection."""

    frozen: int
    trained: int
    head: int
    itemsize: int

    @classmethod
    def of(cls, model: Any) -> Size:
        head = getattr(unwrap(model), "get_output_embeddings", lambda: None)()
        linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        trained = sum(w.numel() for w in linear if w.requires_grad)
        frozen = sum(w.numel() for w in linear) - trained
        size = 0 if head is None else head.weight.numel()
        return cls(frozen, trained, size, linear[0].element_size())


def measure(model: Any, dtype: torch.dtype) -> Rates:
    """The machine's rates, in a fraction of a second."""
    shapes = sorted({tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)})
    shapes = [s for s in shapes if min(s) >= 64 and max(s) <= 1 << 14] or [(512, 512)]
    work = seconds = 0.0
    for out, into in shapes[-8:]:
        x, weight = (torch.ones(rows, into, dtype=dtype) for rows in (ROWS, out))
        seconds += _median_seconds(lambda x=x, weight=weight: x @ weight.t())
        work += 2.0 * ROWS * out * into
    buffer = torch.ones(READ_BYTES // 4)
    return Rates(work / seconds, READ_BYTES / _median_seconds(buffer.sum))


def _median_seconds(call: Callable[[], Any], times: int = 9) -> float:
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def shares(
    rates: Rates,
    actors: Actors,
    reward: Any,
    params: Params,
    episodes: Sequence[Episode],
    seconds: dict[str, float],
    processes: int = 1,
) -> dict[str, float]:
    """For each phase one process's share of the work over its time and the machine's rate, 0 to 1.

    Decoding a token for each row of a batch reads every weight once; scoring and updates are products.
    """
    responses = sum(len(e.response_ids) for e in episodes)
    tokens = responses + sum(len(e.prompt.ids) for e in episodes)
    policy = Size.of(actors.policy)
    others = [Size.of(actors.value.trunk)] if isinstance(actors.value, TrunkValue) else []
    reference = Size(policy.frozen + (policy.trained if actors.frozen is not None else 0), 0, policy.head, 0)
    scorers = [policy, reference, *others]
    if isinstance(reward, RewardModel):
        base = Size.of(reward.trunk)
        scorers.append(Size(base.frozen, 0, 0, 0))
    scoring = sum(2.0 * tokens * (s.frozen + s.trained) + 2.0 * responses * s.head for s in scorers)
    head_passes = 6 if actors.frozen is not None else 4
    update = params.ppo_epochs * (
        sum(tokens * (4.0 * s.frozen + 6.0 * s.trained) for s in (policy, *others))
        + responses * float(head_passes * policy.head)
    )
    longest = max(len(e.response_ids) for e in episodes)
    passes = max(longest, responses / params.rollout_batch_size / processes)
    read = passes * (policy.frozen + policy.trained + policy.head) * policy.itemsize
    return {
        "rollout_bandwidth_share": read / seconds["rollout_s"] / rates.bytes_per_s,
        "scoring_flops_share": scoring / processes / seconds["scoring_s"] / rates.flops_per_s,
        "update_flops_share": update / processes / seconds["update_s"] / rates.flops_per_s,
    }
