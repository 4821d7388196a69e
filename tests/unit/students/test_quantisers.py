"""The two quantisers against transformers' BitNet integration, bit for bit, and against the formula in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.integrations.bitnet import ActQuant, WeightQuant

from student_trainer.students.quantisers.activations import int8_activations
from student_trainer.students.quantisers.bitnet import ternary, ternary_weight

ONE, ZERO = torch.ones(()), torch.zeros(())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def eager_transformers():
    with torch.compiler.set_stance("force_eager"):
        yield


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(48, 64, generator=generator) * size).to(dtype) for size in (1.0, 0.02, 1e-3, 40.0)
    ] + [torch.zeros(4, 8, dtype=dtype)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_weight_equals_transformers_to_the_bit(dtype: torch.dtype) -> None:
    for weight_OI in tensors(dtype):
        assert torch.equal(ternary_weight(weight_OI, ONE), WeightQuant.apply(weight_OI))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_activations_equal_transformers_to_the_bit(dtype: torch.dtype) -> None:
    for input_ND in tensors(dtype):
        assert torch.equal(int8_activations(input_ND, ONE), ActQuant.apply(input_ND))


def test_ternary_weight_follows_the_formula_in_float64() -> None:
    for weight_OI in tensors(torch.float32)[:-1]:
        exact = weight_OI.double().numpy()
        scale = np.abs(exact).mean()
        ratio = exact / scale
        expected = np.clip(np.rint(ratio), -1, 1) * scale
        # Within rounding of a threshold either code is right.
        clear = np.abs(np.abs(ratio) - 0.5) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_allclose(ternary_weight(weight_OI, ONE).numpy()[clear], expected[clear], rtol=1e-6)


def test_int8_activations_follow_the_formula_in_float64() -> None:
    for input_ND in tensors(torch.float32)[:-1]:
        exact = input_ND.double().numpy()
        factor = 127 / np.abs(exact).max(-1, keepdims=True)
        clear = np.abs(np.abs(exact * factor % 1) - 0.5) > 1e-4
        expected = np.clip(np.rint(exact * factor), -128, 127) / factor
        np.testing.assert_allclose(
            int8_activations(input_ND, ONE).numpy()[clear], expected[clear], rtol=1e-5, atol=1e-9
        )


def test_codes_and_scale_are_the_ternary_weight() -> None:
    for weight_OI in tensors(torch.float32):
        codes_OI, scale = ternary(weight_OI)
        assert codes_OI.dtype == torch.int8 and set(codes_OI.unique().tolist()) <= {-1, 0, 1}
        assert torch.equal(codes_OI.float() * scale, ternary_weight(weight_OI, ONE))


@pytest.mark.parametrize("quantise", [ternary_weight, int8_activations])
def test_gradient_is_the_identity_at_any_blend(quantise) -> None:
    gradient = torch.randn(48, 64)
    for blend in (ZERO, torch.tensor(0.3), ONE):
        operand = torch.randn(48, 64, requires_grad=True)
        quantise(operand, blend).backward(gradient)
        assert torch.equal(operand.grad, gradient)


@pytest.mark.parametrize("quantise", [ternary_weight, int8_activations])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_zero_returns_the_operand_and_between_lies_the_line(quantise, dtype: torch.dtype) -> None:
    operand = torch.randn(48, 64).to(dtype)
    assert torch.equal(quantise(operand, ZERO), operand)
    middle = quantise(operand.float(), torch.tensor(0.25))
    expected = 0.75 * operand.double() + 0.25 * quantise(operand.float(), ONE).double()
    torch.testing.assert_close(middle.double(), expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_quantised_in_float32_and_cast_once() -> None:
    weight_OI = torch.randn(256, 256).to(torch.bfloat16)
    in_float32 = ternary_weight(weight_OI.float(), ONE)
    assert torch.equal(ternary_weight(weight_OI, ONE), in_float32.to(torch.bfloat16))
