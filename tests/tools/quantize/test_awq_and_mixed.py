"""AWQ's scaling is the identity; the allocation of bits keeps its budget and beats uniform ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tuneutils.shared.errors import ToolError
from tuneutils.shared.quantizers import Grid, fake_quantize, fit, relative_error
from tuneutils.tools.quantize import awq
from tuneutils.tools.quantize.mixed import Matrix, allocate


def small(family: str = "llama") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaling_every_pair_leaves_the_outputs_in_float64(family: str) -> None:
    model = small(family)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of 1 and biases of 0 would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(ids).logits
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        parameters = dict(layer.named_parameters())
        table = {n.removesuffix(".weight"): p.data for n, p in parameters.items()}
        for pair in awq.pairs(layer, model.config, "layer"):
            channels = len(table[pair.writer])
            scale = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            awq.apply_scale(table, pair, scale, torch.float64)
        for name, parameter in parameters.items():
            parameter.data = table[name.removesuffix(".weight")]
    with torch.no_grad():
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert not torch.equal(
        model.model.layers[0].mlp.up_proj.weight, small(family).model.layers[0].mlp.up_proj.weight
    )


def test_a_norm_in_16_bits_is_still_undone_exactly() -> None:
    table = {"norm": torch.rand(32) + 0.5, "reader": torch.randn(4, 32)}
    product = table["reader"] * table["norm"]
    awq.apply_scale(table, awq.Pair(["reader"], "norm"), torch.rand(32) + 0.5, torch.bfloat16)
    assert torch.equal(table["norm"], table["norm"].bfloat16().float())
    torch.testing.assert_close(table["reader"] * table["norm"], product, rtol=1e-6, atol=1e-7)


def test_the_search_protects_a_loud_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    inputs = torch.randn(500, 32, generator=generator)
    inputs[:, 3] *= 40
    gram, grid = inputs.T @ inputs, Grid(4, 16)
    pair = awq.Pair(["reader"], "norm")
    scale = awq.search_scale([weight], gram, inputs.abs().mean(0), grid, pair)
    assert scale.argmax() == 3
    scaled = fake_quantize(weight * scale, grid, fit(weight * scale, grid)) / scale
    assert relative_error(weight, scaled, gram) < 0.5 * relative_error(
        weight, fake_quantize(weight, grid), gram
    )


def test_other_layouts_and_norms_are_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=10, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
    )
    with pytest.raises(ToolError, match=r"layer: a GPTNeoXLayer has no self_attn\.q_proj, .*mlp\.down_proj"):
        awq.pairs(neox.gpt_neox.layers[0], neox.config, "layer")
    gemma = small("gemma")
    with pytest.raises(ToolError, match="GemmaRMSNorm does not just multiply"):
        awq.pairs(gemma.model.layers[0], gemma.config, "layer")


def matrices(count: int) -> dict[str, Matrix]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for i in range(count):
        base = float(torch.rand(1, generator=generator)) ** 3
        rows = 32 * (1 + i % 3)
        made[f"m{i}"] = Matrix((rows, 64), {3: base, 4: base / 4, 8: base / 1000})
    return made


GRIDS = [Grid(bits, 16) for bits in (3, 4, 8)]


def total(table: dict[str, Matrix], chosen: dict[str, Grid]) -> tuple[float, float]:
    weights = sum(m.shape[0] * m.shape[1] for m in table.values())
    return sum(table[n].cost(g) for n, g in chosen.items()) / weights, sum(
        table[n].errors[g.bits] for n, g in chosen.items()
    )


@pytest.mark.parametrize("budget", [4.0, 4.5, 5.2, 6.9, 9.0])
def test_the_budget_holds_and_the_choice_is_near_the_best(budget: float) -> None:
    table = matrices(7)
    bits, error = total(table, allocate(table, GRIDS, budget))
    assert bits <= budget
    every = (dict(zip(table, grids)) for grids in itertools.product(GRIDS, repeat=len(table)))
    best = min(e for b, e in map(lambda c: total(table, c), every) if b <= budget)  # noqa: C417
    assert error <= 1.3 * best + 1e-12


def test_more_bits_never_cost_quality_and_ties_go_by_name() -> None:
    table = matrices(12)
    errors = [total(table, allocate(table, GRIDS, b))[1] for b in (4.0, 4.5, 5.0, 6.0, 7.0, 9.0)]
    assert errors == sorted(errors, reverse=True)
    same = {name: Matrix((32, 64), {4: 1.0, 8: 0.1}) for name in "dcba"}
    chosen = allocate(same, [Grid(4, 16), Grid(8, 16)], 7.0)
    assert [n for n, g in sorted(chosen.items()) if g.bits == 8] == ["a", "b"]


def test_a_budget_below_the_smallest_choice() -> None:
    with pytest.raises(ToolError, match=r"--budget 3.0: the smallest choice takes 4.000 bits a weight"):
        allocate(matrices(3), GRIDS, 3.0)
