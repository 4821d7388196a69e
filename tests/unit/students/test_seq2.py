"""ParetoQ's two bits: golden numbers in float64, gradients by their formula, and alpha as a parameter of a model."""

from __future__ import annotations

import math

import pytest
import torch

from student_trainer.optim.groups import parameter_groups
from student_trainer.optim.qk_layers import Side
from student_trainer.students.quant_linear import quant_linears, quantise
from student_trainer.students.quantisers.seq2 import EDGE, SMALLEST_ALPHA, dense, levels, stepped_weight
from tests.unit.students.test_fairy2i import GOLDEN, ONE, ZERO, gaussian
from tests.unit.students.tiny import tiny_ids, tiny_model


def error(weight_OI: torch.Tensor, alpha_O: torch.Tensor) -> float:
    return (stepped_weight(weight_OI, alpha_O, ONE) - weight_OI).pow(2).sum().item()


def largest(weight_OI: torch.Tensor) -> torch.Tensor:
    return weight_OI.abs().amax(1)


def test_golden_errors_at_the_first_alphas_and_at_the_best() -> None:
    assert error(GOLDEN, largest(GOLDEN)) == pytest.approx(0.4025, abs=1e-9)
    grid_G = torch.linspace(0.3, 3.0, 20_001, dtype=torch.float64)
    best = sum(
        (stepped_weight(row.repeat(len(grid_G), 1), grid_G, ONE) - row).pow(2).sum(1).min().item() for row in GOLDEN
    )
    assert best == pytest.approx(0.270375, abs=1e-6)


def test_gaussian_weights_lose_what_the_simulation_says() -> None:
    """At the largest |w| it depends on how many there are to be largest among: .224 of rows of 256."""
    weight = gaussian(2048, 256)
    whole = weight.pow(2).sum().item()
    assert error(weight, largest(weight)) / whole == pytest.approx(0.224, abs=0.03)
    assert error(weight, torch.full((2048,), 2.0)) / whole == pytest.approx(0.119, abs=1e-3)


def test_values_are_a_quarter_and_three_quarters_of_alpha() -> None:
    weight = gaussian(16, 32).float()
    alpha = largest(weight) * 0.7
    value = stepped_weight(weight, alpha, ONE)
    assert sorted((value / alpha[:, None]).unique().mul(4).round().unique().tolist()) == [-3.0, -1.0, 1.0, 3.0]
    ratio = (weight / alpha[:, None]).clamp(-EDGE, EDGE)
    torch.testing.assert_close(value, alpha[:, None] * ((2 * ratio - 0.5).round() + 0.5) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_codes_and_steps_are_what_is_multiplied_by(dtype: torch.dtype) -> None:
    weight = gaussian(12, 20).to(dtype)
    codes, step = levels(weight, largest(weight))
    assert codes.dtype == torch.uint8 and codes.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(dense(codes, step).to(dtype), stepped_weight(weight, largest(weight), ONE))


@pytest.mark.parametrize("blend", [1.0, 0.4, 0.0])
def test_gradients_follow_the_formula(blend: float) -> None:
    weight, gradient = gaussian(6, 40).requires_grad_(), gaussian(6, 40, seed=1)
    alpha = (largest(weight.detach()) * 0.5).requires_grad_()
    stepped_weight(weight, alpha, torch.tensor(blend)).backward(gradient)
    ratio = weight.detach() / alpha.detach()[:, None]
    inside = ratio.abs() <= EDGE
    assert 0 < inside.sum() < inside.numel()
    value = stepped_weight(weight.detach(), alpha.detach(), ONE)
    slope = torch.where(inside, (value - weight.detach()) / alpha.detach()[:, None], 0.75 * ratio.sign())
    expected = blend * (slope * gradient).sum(1) / math.sqrt(weight.numel())
    torch.testing.assert_close(alpha.grad, expected, rtol=1e-6, atol=1e-12)
    passed = gradient * torch.where(inside, 1.0, 1.0 - torch.tensor(blend).double())
    torch.testing.assert_close(weight.grad, passed, rtol=1e-7, atol=0)


def test_blend_zero_returns_the_operand() -> None:
    weight = torch.randn(8, 6)
    assert torch.equal(stepped_weight(weight, largest(weight), ZERO), weight)


def test_a_row_of_zeros_and_an_alpha_below_zero_stay_finite() -> None:
    weight = torch.zeros(2, 4)
    weight[1] = 1.0
    value = stepped_weight(weight, torch.tensor([0.0, -1.0]), ONE)
    assert value.abs().max() <= SMALLEST_ALPHA and torch.isfinite(value).all()


def test_alphas_are_parameters_of_the_model_without_decay() -> None:
    model = quantise(tiny_model("llama"), "seq2")
    layers = dict(quant_linears(model))
    names = {f"{name}.alpha" for name in layers}
    assert names == {name for name, _ in model.named_parameters() if name.endswith("alpha")} and len(names) == 14
    for layer in layers.values():
        assert torch.equal(layer.alpha, largest(layer.weight))
    groups = {group.name: group.parameters for group in parameter_groups(model)}
    assert names <= groups["vectors"].keys()  # which settings.UndecayedGroupSettings leaves without decay
    model(tiny_ids()).logits.pow(2).mean().backward()
    assert all(layer.alpha.grad is not None and layer.alpha.grad.any() for layer in layers.values())


def test_what_scales_a_row_scales_its_alpha_and_keeps_its_codes() -> None:
    """As QK-clip scales rows by heads."""
    model = quantise(tiny_model("llama", attention_bias=True), "seq2")
    layer = model.model.layers[0].self_attn.q_proj
    codes, before = levels(layer.weight, layer.alpha)[0], stepped_weight(layer.weight, layer.alpha, ONE).detach()
    Side(layer).scale([0.5, 1.0, 0.25, 1.0])
    factors = torch.tensor([0.5, 1.0, 0.25, 1.0]).repeat_interleave(16)[:, None]
    assert torch.equal(levels(layer.weight, layer.alpha)[0], codes)
    torch.testing.assert_close(stepped_weight(layer.weight, layer.alpha, ONE), before * factors)
