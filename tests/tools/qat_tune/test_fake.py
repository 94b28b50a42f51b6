"""The rounding in training is the quantizers' own, and its gradients are the papers'."""

from __future__ import annotations

import math

import pytest

from tuneutils.shared.quantizers import Grid, Scales, fake_quantize, fake_quantize_rows, fit, from_codes
from tuneutils.tools.qat_tune.fake import QatLinear, RoundByRange, RoundByScale, RoundRows, usable

# isort: split
import torch
from torch import Tensor, nn

GRIDS = [
    Grid(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (None, 16, 64)
    for symmetric in (True, False)
]


def matrix(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_training_rounds_as_quantize_does(grid: Grid, stored: torch.dtype) -> None:
    weight = matrix()
    weight[3, :64] = 0  # a group of zeros
    expected = fake_quantize(weight, grid).to(stored)
    assert torch.equal(RoundByRange.apply(weight, grid, stored), expected)
    scales = fit(weight, grid)
    assert torch.equal(RoundByScale.apply(weight, scales.scale, scales.zero, grid, stored), expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("learn_scales", [False, True])
@pytest.mark.parametrize("lora", [None, (4, 8.0)])
def test_codes_stand_for_what_was_simulated(
    grid: Grid, learn_scales: bool, lora: tuple[int, float] | None
) -> None:
    linear = nn.Linear(128, 24)
    layer = QatLinear(linear, grid, torch.bfloat16, learn_scales=learn_scales, lora=lora)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.01 * matrix(*parameter.shape, seed=1) if parameter.dim() == 2 else 0
    codes, scales = layer.codes()
    simulated = layer.simulated().float()
    assert torch.equal(from_codes(codes, grid, scales).bfloat16().float(), simulated)
    x = matrix(5, 128)
    before = layer(x)
    assert torch.equal(before, nn.functional.linear(x, simulated, linear.bias))
    layer.settle()
    assert torch.equal(layer(x), before)


def test_the_identitys_gradient_passes_rounding_by_range() -> None:
    weight, given = matrix().requires_grad_(), matrix(seed=2)
    RoundByRange.apply(weight, Grid(4, 16, False), torch.float32).backward(given)
    assert torch.equal(weight.grad, given)


def lsq_by_hand(v: float, s: float, low: int, high: int) -> tuple[float, float, float]:
    """Esser et al. 2020, equations 1 to 5 for one weight: value, gradient in s (unscaled), in v."""
    place = v / s
    if place <= low:
        return low * s, float(low), 0.0
    if place >= high:
        return high * s, float(high), 0.0
    return round(place) * s, round(place) - place, 1.0


def test_learnt_scales_have_the_papers_gradient() -> None:
    grid, size = Grid(3, 8), 8
    weight = torch.linspace(-1.7, 1.9, 32).view(2, 16).clone().requires_grad_()
    scale = torch.tensor([[0.25, 0.5], [0.375, 0.125]], requires_grad=True)  # exact in bfloat16
    upstream = matrix(2, 16, seed=3)
    out = RoundByScale.apply(weight, scale, torch.zeros(2, 2), grid, torch.float32)
    out.backward(upstream)
    for row in range(2):
        for group in range(2):
            total = 0.0
            for column in range(group * size, (group + 1) * size):
                v, s = weight[row, column].item(), scale[row, group].item()
                value, in_scale, in_weight = lsq_by_hand(v, s, grid.low, grid.high)
                given = upstream[row, column].item()
                assert out[row, column].item() == pytest.approx(value)
                assert weight.grad[row, column].item() == pytest.approx(in_weight * given)
                total += in_scale * given
            expected = total / math.sqrt(size * grid.high)
            assert scale.grad[row, group].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("grid", [Grid(4, 16, False), Grid(3, None, False), Grid(8, 16)], ids=str)
def test_the_gradients_are_those_of_the_authors_autograd_form(grid: Grid) -> None:
    """Esser et al. 2020, appendix A: division, clamp, straight-through rounding, product, scaled gradient."""
    weight = matrix(4, 64).double().requires_grad_()
    scales = fit(matrix(4, 64), grid)
    step = scales.scale.mul(0.7).bfloat16().double().requires_grad_()  # some weights are clipped
    size = grid.group_size or 64
    blocks = weight.view(4, -1, size)
    factor = 1 / math.sqrt(size * (grid.high if grid.symmetric else grid.high - grid.low))
    s = ((step - step * factor).detach() + step * factor)[..., None]
    place = (blocks / s + scales.zero[..., None]).clamp(grid.low, grid.high)
    codes = (place.round() - place).detach() + place
    theirs = ((codes - scales.zero[..., None]) * s).flatten(1)
    upstream = matrix(4, 64, seed=4)
    theirs.backward(upstream.double())
    ours_weight, ours_step = matrix(4, 64).requires_grad_(), step.detach().float().requires_grad_()
    ours = RoundByScale.apply(ours_weight, ours_step, scales.zero, grid, torch.float32)
    ours.backward(upstream)
    torch.testing.assert_close(ours.double(), theirs)
    torch.testing.assert_close(ours_weight.grad.double(), weight.grad)
    torch.testing.assert_close(ours_step.grad.double(), step.grad, rtol=1e-4, atol=1e-5)
    assert 0 < float((weight.grad == 0).double().mean()) < 0.5


def test_lora_gets_its_gradient_through_the_rounding() -> None:
    """Against autograd on W + s B A with the straight-through estimator written out."""
    linear, grid = nn.Linear(64, 32, bias=False), Grid(4, 16, False)
    layer = QatLinear(linear, grid, torch.float32, lora=(4, 8.0))
    with torch.no_grad():
        layer.lora_b.copy_(matrix(32, 4))
    x, upstream = matrix(6, 64), matrix(6, 32, seed=5)
    layer(x).backward(upstream)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    whole = linear.weight.detach() + 2.0 * b @ a
    through = whole + (fake_quantize(whole.detach(), grid) - whole.detach())
    (x @ through.T).backward(upstream)
    torch.testing.assert_close(layer.lora_a.grad, a.grad)
    torch.testing.assert_close(layer.lora_b.grad, b.grad)
    assert layer.weight.grad is None


def test_inputs_are_rounded_token_by_token() -> None:
    x = matrix(6, 64).requires_grad_()
    out = RoundRows.apply(x)
    assert torch.equal(out, fake_quantize_rows(x.detach()))
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_scale_stays_positive() -> None:
    made = usable(torch.tensor([0.3, 0.0, -1.0]))
    assert (made > 0).all()
    assert torch.equal(made, made.bfloat16().float())


def test_a_settled_layer_has_nothing_left_to_train() -> None:
    layer = QatLinear(nn.Linear(32, 8), Grid(4, 16), torch.bfloat16, learn_scales=True, lora=(2, 4.0))
    layer.settle()
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias"}
    assert Scales(layer.initial, layer.zero).scale.shape == (8, 2)
