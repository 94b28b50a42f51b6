"""Episodes: which prompts come next, what the policy answers, and how it is scored.

Every draw of randomness is a function of the seed, what it is for, and a counter, so that any part of a run
can be made again and is the same however it is spread over processes.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuneutils.shared import device  # noqa: F401 - sets the thread policy before torch loads

import torch  # isort: skip
from torch import Tensor

from tuneutils.shared.sample import Sampling, generate
from tuneutils.tools.ppo_run.actors import Actors, collate
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.prompts import Prompt
from tuneutils.tools.ppo_run.rewards import Episode, Reward

PROMPTS, SAMPLING, MINIBATCHES, HELDOUT = range(4)


def stream_seed(seed: int, *path: int) -> int:
    """A seed of its own for each path of counters."""
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0])


def next_prompts(prompts: Sequence[Prompt], start: int, count: int, seed: int) -> list[Prompt]:
    """Prompts ``start`` to ``start + count`` of an endless row of shuffles, the same in every process."""
    made: list[Prompt] = []
    orders: dict[int, np.ndarray] = {}
    for position in range(start, start + count):
        epoch, place = divmod(position, len(prompts))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng((seed, PROMPTS, epoch)).permutation(len(prompts))
        made.append(prompts[orders[epoch][place]])
    return made


def minibatch_rows(
    lengths: Sequence[int],
    minibatches: int,
    micro_batch_size: int,
    processes: Processes,
    seed: int,
    *path: int,
) -> list[list[list[int]]]:
    """This process's rows of each minibatch of one pass, cut into micro-batches of like length.

    The shuffle depends on seed and path alone; a minibatch is the same rows for any number of processes.
    """
    order = np.random.default_rng((seed, MINIBATCHES, *path)).permutation(len(lengths))
    made = []
    for chosen in np.array_split(order, minibatches):
        rows = processes.share(sorted(chosen.tolist(), key=lambda i: (lengths[i], i)))
        made.append([rows[i : i + micro_batch_size] for i in range(0, len(rows), micro_batch_size)])
    return made


@dataclass(frozen=True)
class Generation:
    """How the policy is sampled: the full softmax at one temperature, the model's own settings ignored."""

    max_new_tokens: int
    batch_size: int
    stop_ids: tuple[int, ...]


def respond(
    actors: Actors, prompts: Sequence[Prompt], how: Generation, seed: int, row_ids: Sequence[int]
) -> list[Episode]:
    """One episode for each prompt, cut at the first stop token."""
    sampling = Sampling(
        max_new_tokens=how.max_new_tokens,
        temperature=actors.temperature,
        top_k=0,
        top_p=1.0,
        stop_token_ids=how.stop_ids,
        seed=seed,
    )
    with actors.autocast():
        completions = generate(
            actors.policy,
            [p.ids for p in prompts],
            sampling,
            batch_size=how.batch_size,
            pad_token_id=actors.pad_id,
            row_ids=row_ids,
        )
    return [
        Episode(
            prompt,
            tuple(c.token_ids),
            c.finish_reason == "stop",
            actors.tokenizer.decode(c.token_ids, skip_special_tokens=True),
        )
        for prompt, c in zip(prompts, completions, strict=True)
    ]


def collect(
    actors: Actors,
    reward: Reward,
    prompts: Sequence[Prompt],
    how: Generation,
    processes: Processes,
    seed: int,
) -> tuple[list[Episode], Tensor, float]:
    """Episodes of all processes and their scores ``(B,)``; each process makes and scores its share.

    Also gives how many seconds the reward took here.
    """
    mine = list(enumerate(prompts))[processes.rank :: processes.size]

    reward_s = 0.0

    def made() -> list[tuple[Episode, float]]:
        nonlocal reward_s
        if not mine:
            return []
        episodes = respond(actors, [p for _, p in mine], how, seed, [i for i, _ in mine])
        trim_heap()
        started = time.monotonic()
        scores = reward(episodes)
        reward_s = time.monotonic() - started
        return list(zip(episodes, scores, strict=True))

    pairs = processes.together(made)
    return [e for e, _ in pairs], torch.tensor([s for _, s in pairs]), reward_s


def trim_heap() -> None:
    """Give the allocator's free memory back: a phase's blocks seldom fit the next one's."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


@dataclass
class Scored:
    """What the models said of a batch before any update: ``(B, R)`` each, 0 on pads."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor
    mask: Tensor


def score(
    actors: Actors, episodes: Sequence[Episode], micro_batches: Sequence[Sequence[int]], processes: Processes
) -> Scored:
    """Old and reference log-probabilities, values and entropies.

    The forward pass is the one of training, on the micro-batches of the first pass: where nothing has been
    updated yet, the probability ratio is then 1 to the last bit. The sampler's own would not be.
    """
    width = max(len(e.response_ids) for e in episodes)

    @torch.no_grad()
    def policy(rows: Sequence[int]) -> Tensor:
        batch = collate([episodes[i] for i in rows], actors.pad_id, width, actors.where)
        logprobs, values, entropy = actors.policy_logprobs(batch, with_entropy=True)
        assert entropy is not None
        if values is None:
            values = actors.trunk_values(batch)
        return torch.stack([p.float() for p in (logprobs, values, entropy, batch.mask)], 1).cpu()

    def reference(rows: Sequence[int]) -> Tensor:
        batch = collate([episodes[i] for i in rows], actors.pad_id, width, actors.where)
        return actors.reference_logprobs(batch).float().cpu()

    ours = actors.workers.map(policy, micro_batches)
    with actors.reference_in_place():
        theirs = actors.workers.map(reference, micro_batches)
    mine = [
        (i, torch.cat([said, ref[None]]))
        for rows, batch, refs in zip(micro_batches, ours, theirs, strict=True)
        for i, said, ref in zip(rows, batch, refs, strict=True)
    ]
    found = dict(pair for part in processes.together_raw(mine) for pair in part)
    logprobs, values, entropy, mask, ref_logprobs = torch.stack([found[i] for i in range(len(episodes))], 1)
    return Scored(logprobs, ref_logprobs, values, entropy, mask)
