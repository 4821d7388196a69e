"""Fairy2i: golden numbers in float64, the lossless complex form, the rule of the sectors, and how a layer has it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from student_trainer.students.quant_linear import quant_linears, quantise, quantise_as
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.fairy2i import (
    SMALLEST_SCALE,
    Fairy2i,
    complex_form,
    dense,
    phase_weight,
    planes,
    real_form,
)
from student_trainer.students.quantisers.record import Record, read_record
from tests.unit.students.tiny import spread_weights, tiny_ids, tiny_model

ONE, ZERO = torch.ones(()), torch.zeros(())
GOLDEN = torch.tensor(
    [[0.9, -0.4, 0.3, 0.7], [-0.2, 0.5, -0.8, 0.1], [0.6, 0.25, -0.35, 1.1], [1.0, 0.15, 0.45, -0.65]],
    dtype=torch.float64,
)
DIRECTIONS = torch.tensor([1, 1j, -1, -1j], dtype=torch.complex128)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(weight_OI: torch.Tensor, stages: int) -> float:
    return (phase_weight(weight_OI, ONE, stages) - weight_OI).pow(2).sum().item()


def test_the_golden_matrix_in_complex_form() -> None:
    u, w = complex_form(GOLDEN)
    expected_u = torch.tensor([[0.275 + 0.15j, 0.35 - 0.225j], [0.125 + 0.9j, -0.075 + 0.025j]])
    expected_w = torch.tensor([[0.625 + 0.45j, -0.75 + 0.475j], [-0.325 + 0.1j, 0.575 + 0.125j]])
    torch.testing.assert_close(u, expected_u.to(u.dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(w, expected_w.to(w.dtype), rtol=1e-6, atol=0)


def test_golden_codes_scales_and_errors() -> None:
    codes, scales = planes(GOLDEN, 2)
    assert codes.flatten(2).tolist() == [[[0, 0, 1, 2], [0, 2, 2, 0]], [[1, 3, 0, 0], [1, 1, 0, 1]]]
    expected = [[[0.233333, 0.9], [0.56875, 1e-6]], [[0.141667, 0.1875], [0.24375, 0.35]]]
    torch.testing.assert_close(scales, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-7)
    for stages, golden in ((1, 1.358021), (2, 0.283290), (3, 0.075503)):
        assert error(GOLDEN, stages) == pytest.approx(golden, abs=5e-7)


def test_the_complex_form_computes_the_same_map() -> None:
    weight, x = gaussian(6, 10), gaussian(10, 3, seed=1)
    u, w = complex_form(weight)
    z = torch.complex(x[:5], x[5:])
    y = u @ z + w @ z.conj()
    torch.testing.assert_close(torch.cat((y.real, y.imag)), weight @ x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_round_trip_is_exact(dtype: torch.dtype) -> None:
    spread = 10.0 ** torch.randint(-1, 2, (48, 64), generator=torch.Generator().manual_seed(2))
    weight = (gaussian(48, 64) * spread).to(dtype)
    assert torch.equal(real_form(*complex_form(weight)).to(dtype), weight)


def test_each_entry_takes_the_nearest_of_four_directions() -> None:
    weight = gaussian(32, 24)
    (codes,), _ = planes(weight, 1)
    for part, codes_OI in zip(complex_form(weight), codes, strict=True):
        unit = part / part.abs()
        nearest = (unit[..., None] - DIRECTIONS).abs().argmin(-1)
        assert torch.equal(codes_OI.long(), nearest) and len(nearest.unique()) == 4


def test_sectors_begin_at_minus_a_quarter_of_pi() -> None:
    """[-pi/4, pi/4) is +1, and so on around: the four edges, and either side of each."""
    quarters = [1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j]
    expected = []
    numbers = []
    for code, edge in enumerate(quarters):
        for turn in (-1e-9, 0.0, 1e-9):
            numbers.append(edge if turn == 0.0 else edge * complex(math.cos(turn), math.sin(turn)))
            expected.append(code if turn < 0 else (code + 1) % 4)
    u = torch.tensor([numbers], dtype=torch.complex128)
    (codes,), _ = planes(real_form(u, torch.zeros_like(u)), 1)
    assert codes[0, 0].tolist() == expected
    assert codes[1].unique().tolist() == [0]  # of nothing at all: +1


def test_an_empty_sector_is_worth_next_to_nothing() -> None:
    u = torch.tensor([[2.0 + 1j, -4.0 + 1j]], dtype=torch.complex128)
    _, scales = planes(real_form(u, torch.zeros_like(u)), 2)
    assert scales[0].tolist() == [[3.0, SMALLEST_SCALE], [SMALLEST_SCALE, SMALLEST_SCALE]]
    assert torch.isfinite(phase_weight(torch.zeros(4, 6), ONE, 2)).all()


def test_a_stage_takes_off_what_theory_says_and_two_are_no_worse_than_one() -> None:
    for seed in range(20):
        weight = gaussian(16, 24, seed) * 10.0 ** (seed % 5 - 2)
        codes, scales = planes(weight, 2)
        left = weight.pow(2).sum().item()
        for stage in range(2):
            # |A|^2 = 2 (|U|^2 + |W|^2): a stage cuts it by twice n_re s_re^2 + n_im s_im^2 of each.
            for part in range(2):
                imaginary = codes[stage, part] % 2 == 1
                counts = torch.stack(((~imaginary).sum(), imaginary.sum()))
                left -= 2 * (counts * scales[stage, part].pow(2)).sum().item()
            assert error(weight, stage + 1) == pytest.approx(left, rel=1e-9)
        assert error(weight, 2) <= error(weight, 1)


def test_gaussian_weights_lose_what_the_simulation_says() -> None:
    weight = gaussian(1024, 1024)
    for stages, share in ((1, 0.363), (2, 0.130)):
        assert error(weight, stages) / weight.pow(2).sum().item() == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stages", [1, 2])
def test_codes_and_scales_are_what_is_multiplied_by(dtype: torch.dtype, stages: int) -> None:
    weight = gaussian(20, 36).to(dtype)
    assert torch.equal(dense(*planes(weight, stages)).to(dtype), phase_weight(weight, ONE, stages))


@pytest.mark.parametrize("stages", [1, 2])
def test_the_gradient_is_the_identity_at_any_blend(stages: int) -> None:
    gradient = torch.randn(8, 6)
    for blend in (ZERO, torch.tensor(0.3), ONE):
        weight = torch.randn(8, 6, requires_grad=True)
        phase_weight(weight, blend, stages).backward(gradient)
        assert torch.equal(weight.grad, gradient)


def test_blend_zero_returns_the_operand_and_between_lies_the_line() -> None:
    weight = torch.randn(8, 6)
    assert torch.equal(phase_weight(weight, ZERO, 2), weight)
    middle = 0.75 * weight.double() + 0.25 * phase_weight(weight, ONE, 2).double()
    torch.testing.assert_close(phase_weight(weight, torch.tensor(0.25), 2).double(), middle, rtol=1e-5, atol=1e-6)


def test_odd_sides_are_refused_by_name_and_nothing_is_changed() -> None:
    model = tiny_model("llama", intermediate_size=65)
    with pytest.raises(
        ValueError, match=r"fairy2i can't take model\.layers\.0\.mlp\.gate_proj, and 5 more: it is 65 x"
    ):
        quantise(model, "fairy2i")
    assert not list(quant_linears(model)) and read_record(model.config) is None


@pytest.mark.parametrize("stages", [None, 1])
def test_a_model_keeps_its_names_and_its_record_says_the_stages(stages: int | None) -> None:
    model = tiny_model("llama")
    names = set(model.state_dict())
    quantise(model, "fairy2i", stages=stages)
    assert {name for name in model.state_dict() if not name.endswith("quantisation_blend")} == names
    record = read_record(model.config)
    assert record is not None and (record.stages, record.activations, record.sub_norm) == (stages or 2, "none", "none")
    again = tiny_model("llama")
    quantise_as(again, record)
    assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)
    (bits,) = {layer.weight_quantiser.bits for _, layer in quant_linears(again)}
    assert bits == (stages or 2)


def test_a_quantiser_without_stages_says_that_they_do_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = quantise(tiny_model("llama"), "bitnet", stages=1)
    assert "stages=1 has no effect: quantiser bitnet has none" in caplog.text
    assert "stages" not in model.config.student_quantisation


def test_training_a_layer_lowers_its_loss() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    spread_weights(layer)
    x, y = torch.randn(64, 8), torch.randn(64, 4)
    weights = [each.weight for each in layer]
    optimizer = torch.optim.Adam(weights, 1e-2)
    losses = []
    for _ in range(60):
        hidden = torch.tanh(x @ phase_weight(weights[0], ONE, 2).T)
        loss = (hidden @ phase_weight(weights[1], ONE, 2).T - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_stages_are_its_bits() -> None:
    assert [Fairy2i(stages).bits for stages in (1, 2)] == [1.0, 2.0]
    assert QUANTISERS["fairy2i"].of(Record("fairy2i", "none", 1e-8, "none", stages=1)).stages == 1
    assert QUANTISERS["fairy2i"].stages == 2
