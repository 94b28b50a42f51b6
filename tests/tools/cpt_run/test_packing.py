"""Packing, mixing and the learning rate against brute force and other implementations."""

from __future__ import annotations

import random

import pytest

from tuneutils.shared.errors import ToolError
from tuneutils.tools.cpt_run.packing import best_fit, mix
from tuneutils.tools.cpt_run.schedule import rate_factor
from tuneutils.tools.cpt_run.units import seconds, share


def best_fit_by_search(lengths: list[int], capacity: int) -> list[list[int]]:
    """Ding et al. 2024, algorithm 1, by looking through all rows."""
    rows: list[list[int]] = []
    free: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r in range(len(rows)) if free[r] >= lengths[piece]]
        if not fitting:
            rows.append([])
            free.append(capacity)
            fitting = [len(rows) - 1]
        least = min(free[r] for r in fitting)
        row = [r for r in fitting if free[r] == least][-1]
        rows[row].append(piece)
        free[row] -= lengths[piece]
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_each_piece_goes_where_it_fits_best(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 40) for _ in range(120)]
    rows = best_fit(lengths, 40)
    assert sorted(i for row in rows for i in row) == list(range(120))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # Ties between rows with the same space may be settled otherwise; the rows' sums are then the same.
    expected = best_fit_by_search(lengths, 40)
    assert sorted(sum(lengths[i] for i in r) for r in rows) == sorted(
        sum(lengths[i] for i in r) for r in expected
    )


@pytest.mark.parametrize("wanted", [0.0, 0.05, 0.25, 0.9])
def test_replay_has_its_share_at_every_row_of_the_run(wanted: float) -> None:
    rng = random.Random(1)
    domain, replay = ([rng.randint(1, 50) for _ in range(n)] for n in (30, 7))
    mixture = mix(domain, replay, wanted, seed=3, tokens=20_000)
    done = [0, 0]
    for is_replay, row in mixture.rows:
        done[is_replay] += (domain, replay)[is_replay][row]
        assert -wanted * 50 <= done[1] - wanted * sum(done) <= (1 - wanted) * 50
    assert done == [mixture.domain_tokens, mixture.replay_tokens]
    last = (domain, replay)[mixture.rows[-1][0]][mixture.rows[-1][1]]
    assert 20_000 <= sum(done) < 20_000 + last


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_pass_takes_every_row_of_the_domain_once(epochs: int) -> None:
    mixture = mix([5] * 9, [5] * 4, 0.25, seed=0, epochs=epochs)
    domain = [row for is_replay, row in mixture.rows if not is_replay]
    for start in range(0, 9 * epochs, 9):
        assert sorted(domain[start : start + 9]) == list(range(9))
    assert mixture.replay_tokens == 15 * epochs  # a quarter of 60
    assert len({tuple(domain[s : s + 9]) for s in range(0, 9 * epochs, 9)}) == epochs


def test_a_run_ends_alike_by_rows_and_by_their_tokens() -> None:
    by_rows = mix([7, 3, 9], [4, 6], 0.3, seed=5, rows=50)
    assert mix([7, 3, 9], [4, 6], 0.3, seed=5, tokens=by_rows.tokens) == by_rows


@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 20), (5, 5)])
def test_cosine_is_the_one_of_transformers(warmup: int, steps: int) -> None:
    import torch
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=0.1)
    for step in range(1, steps + 1):
        optimizer.step()
        theirs.step()
        ours = rate_factor(step, steps, schedule="cosine", warmup=warmup, final=0.1)
        # At the step that ends the warm-up theirs has begun to decay where nothing is left of it.
        if step > warmup or warmup < steps:
            assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)


def test_linear_and_constant_rates() -> None:
    linear = [rate_factor(s, 6, schedule="linear", warmup=2, final=0.2) for s in range(1, 7)]
    assert linear == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])
    constant = [rate_factor(s, 4, schedule="constant", warmup=2, final=0.2) for s in range(1, 5)]
    assert constant == pytest.approx([0.5, 1, 1, 1])


def test_units() -> None:
    assert [seconds(t) for t in ("30m", "90s", "1h30m", "45", "0.5h")] == [1800, 90, 5400, 45, 1800]
    assert [share(t, "-") for t in ("3%", "0.03", "0")] == pytest.approx([0.03, 0.03, 0])
    for bad in ("", "m", "soon", "1.2.3m", "0s", "-5m"):
        with pytest.raises(ToolError):
            seconds(bad)
    for bad in ("three", "-1%", "nan", "inf"):
        with pytest.raises(ToolError):
            share(bad, "-")
