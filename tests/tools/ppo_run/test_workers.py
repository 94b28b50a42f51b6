"""Threads with a micro-batch each: the order of results and of sums, what goes wrong, and a whole update."""

from __future__ import annotations

import random
import signal
import threading
import time
from pathlib import Path

import pytest

from tuneutils.shared import device  # noqa: F401

import torch  # isort: skip
from torch import Tensor
from transformers import AutoModelForCausalLM

from tuneutils.shared.errors import ToolError
from tuneutils.shared.logprobs_model import separable_head
from tuneutils.tools.ppo_run.ppo import improve, make_optimizer
from tuneutils.tools.ppo_run.processes import Processes
from tuneutils.tools.ppo_run.rollout import minibatch_rows, score
from tuneutils.tools.ppo_run.workers import Turns, Workers

from .setup import CPU, actors_of, build_reward_model, episodes_of, params_of, perturb, reward_model_of

LENGTHS = [(3, 4), (7, 1), (2, 6), (5, 3), (1, 6), (4, 4), (6, 2), (2, 2)]


def test_results_are_in_order_and_errors_wait_for_all() -> None:
    ended = []

    def call(item: int) -> int:
        time.sleep(0.01 * (3 - item % 3))
        ended.append(item)
        if item in (2, 4):
            raise ToolError(f"item {item}")
        return item

    assert Workers(3).map(call, [1, 3, 5, 7]) == [1, 3, 5, 7]
    ended.clear()
    with pytest.raises(ToolError, match="item 2"):
        Workers(2).map(call, range(6))
    assert sorted(ended) == list(range(6))


def test_an_interrupt_drops_what_has_not_begun() -> None:
    """SIGTERM and Ctrl-C raise in the main thread, which waits; at exit Python waits for all that is queued."""
    workers, begun, main = Workers(2), [], threading.get_ident()

    def call(item: int) -> None:
        begun.append(item)
        if item == 0:
            signal.pthread_kill(main, signal.SIGUSR1)
        time.sleep(0.2)

    def stop(_signum: int, _frame: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(SystemExit):
            workers.map(call, range(50))
    finally:
        signal.signal(signal.SIGUSR1, before)
    time.sleep(1)
    assert len(begun) < 10


def test_gradients_are_added_in_the_order_of_the_passes() -> None:
    """1e8 + 1 - 1e8 depends on the order in float32; whatever thread is ahead, the sum is that of one thread."""
    summands = [1e8, 1.0, -1e8, 1.0]
    for seed in range(5):
        parameter = torch.nn.Parameter(torch.zeros(3))
        turns = Turns([parameter])
        pauses = random.Random(seed).sample([0.0, 0.01, 0.02, 0.03], 4)

        def backward(number: int) -> None:
            with turns.pass_number(number):  # noqa: B023
                time.sleep(pauses[number])  # noqa: B023
                (parameter * summands[number]).sum().backward()  # noqa: B023

        with turns.held():
            Workers(4).map(backward, range(4))
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [1.0] * 3


def test_a_pass_that_fails_does_not_stop_those_after_it() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    turns = Turns([parameter])

    def backward(number: int) -> None:
        with turns.pass_number(number):
            if number == 0:
                raise ToolError("no memory")
            parameter.sum().backward()

    with turns.held(), pytest.raises(ToolError, match="no memory"):
        Workers(2).map(backward, range(3))
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0] * 3
    assert threading.active_count() < 20


@pytest.mark.parametrize("value", ["policy", "reward"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_update_by_two_threads_is_that_of_one_to_the_last_bit(
    method: str, value: str, tiny_model: Path, tmp_path: Path
) -> None:
    made: list[dict[str, Tensor]] = []
    for size in (1, 2):
        reward_model = reward_model_of(build_reward_model(tmp_path / "rm", tiny_model), tiny_model)
        actors = actors_of(tiny_model, reward_model, method=method, value=value)
        assert actors.transform is not None
        actors.workers = reward_model.workers = Workers(size)
        perturb(actors, 0.01, seed=3)
        params = params_of(tiny_model, method=method, value=value, learning_rate=1e-3)
        episodes = episodes_of(LENGTHS)
        lengths = [sum(x) for x in LENGTHS]
        passes = [minibatch_rows(lengths, 2, 2, Processes(), 0, 0, epoch) for epoch in range(3)]
        rewards = torch.tensor(reward_model(episodes))
        with actors.fused():
            old = score(actors, episodes, [r for step in passes[0] for r in step], Processes())
            advantages = old.mask * rewards[:, None]
            optimizer = make_optimizer(actors, params)
            metrics = improve(
                actors, optimizer, params, episodes, old, advantages, advantages, passes, Processes()
            )
        assert metrics["first_ratio_deviation"] == 0.0
        tensors = {n: p.detach().clone() for n, p in actors.trainable().items()}
        made.append(tensors | {"old": old.logprobs, "reference": old.ref_logprobs, "rewards": rewards})
    for name, wanted in made[0].items():
        assert torch.equal(made[1][name], wanted), name


def test_a_head_that_reads_something_else_is_not_called_apart(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    transform = separable_head(model)
    assert transform is not None
    assert (transform.scale, transform.softcap) == (1.0, None)
    forward = model.forward

    def scaled(**inputs: object) -> object:  # as MiniCPM does between decoder and head
        handle = model.lm_head.register_forward_pre_hook(lambda _, given: (given[0] / 2,))
        try:
            return forward(**inputs)
        finally:
            handle.remove()

    model.forward = scaled
    assert separable_head(model) is None


def test_as_many_workers_as_rows_and_cores_allow() -> None:
    cores = torch.get_num_threads()
    assert Workers.for_rows(3, CPU).size == 1
    assert Workers.for_rows(1024, CPU).size == cores
    assert Workers.for_rows(1024, torch.device("cuda")).size == 1
