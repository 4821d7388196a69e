"""Round-to-nearest weights and 4-bit activations: against a search of the grid, and as settings make them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from student_trainer.students.quant_linear import quant_linears, quantise, quantise_as
from student_trainer.students.quantisers import QUANTISERS
from student_trainer.students.quantisers.activations import int4_activations
from student_trainer.students.quantisers.bitnet import BITNET
from student_trainer.students.quantisers.none import NONE
from student_trainer.students.quantisers.record import Record, read_record
from student_trainer.students.quantisers.rtn import RTN, RoundToNearest, round_to_nearest
from tests.unit.students.tiny import tiny_ids, tiny_model

ONE, ZERO = torch.ones(()), torch.zeros(())


def weights() -> torch.Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8, 12])
def test_every_weight_is_the_nearest_of_its_groups_values(bits: int, group: int | None) -> None:
    """The grid is built value by value in float64, 0 among them, and searched."""
    found_OI = round_to_nearest(weights(), bits, group).double()
    for row, row_found in zip(weights().double(), found_OI, strict=True):
        for part, part_found in zip(row.split(group or 24), row_found.split(group or 24), strict=True):
            step = (max(part.max().item(), 0.0) - min(part.min().item(), 0.0)) / (2**bits - 1)
            zero = round(-min(part.min().item(), 0.0) / step)
            grid = [(code - zero) * step for code in range(2**bits)]
            assert any(abs(value) < 1e-12 for value in grid)
            for weight, value in zip(part.tolist(), part_found.tolist(), strict=True):
                nearest = min(grid, key=lambda each: abs(each - weight))
                assert value == pytest.approx(nearest, abs=1e-5) or abs(abs(value - nearest) - step) < 1e-5
                assert abs(value - weight) <= abs(nearest - weight) + 1e-5
            assert len({round(value, 5) for value in part_found.tolist()}) <= 2**bits


def test_rows_of_one_sign_and_of_zeros_keep_a_zero() -> None:
    found = round_to_nearest(torch.stack([torch.linspace(1, 3, 8), torch.zeros(8), -torch.ones(8)]), 2, None)
    assert found[0].tolist() == pytest.approx([1, 1, 2, 2, 2, 2, 3, 3])
    assert not found[1].any() and found[2].tolist() == pytest.approx([-1.0] * 8)


def test_more_bits_and_smaller_groups_are_nearer() -> None:
    def distance(bits: int, group: int | None) -> float:
        return float((round_to_nearest(weights(), bits, group) - weights()).norm())

    assert distance(8, None) < distance(4, None) < distance(3, None) < distance(2, None)
    assert distance(4, 8) < distance(4, None)


def test_both_ends_of_the_blend_are_exact_and_the_gradient_passes() -> None:
    layer = nn.Linear(24, 6)
    quantiser = RoundToNearest(4, 8)
    assert torch.equal(quantiser.weight(layer, ZERO), layer.weight)
    assert torch.equal(quantiser.weight(layer, ONE), round_to_nearest(layer.weight, 4, 8))
    quantiser.weight(layer, ONE).square().sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, 2 * round_to_nearest(layer.weight, 4, 8))


def test_int4_activations_are_on_a_tokens_grid_of_sixteen() -> None:
    x_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y_ND = int4_activations(x_ND, ONE)
    codes_ND = y_ND / x_ND.abs().amax(-1, keepdim=True) * 7
    torch.testing.assert_close(codes_ND, codes_ND.round(), atol=1e-4, rtol=0.0)
    assert codes_ND.round().min() >= -8 and codes_ND.round().max() <= 7
    y_ND.sum().backward()
    assert torch.equal(x_ND.grad, torch.ones_like(x_ND))  # type: ignore[arg-type]
    assert torch.equal(int4_activations(x_ND, ZERO), x_ND)


def test_a_student_is_made_by_its_record_and_made_again() -> None:
    plain = tiny_model("llama")
    model = quantise(tiny_model("llama"), "rtn", bits=3, group_size=32, quantise_activations=True, activation_bits=4)
    record = read_record(model.config)
    assert record == Record("rtn", "none", 1e-8, "int4", bits=3, group_size=32)
    again = quantise_as(tiny_model("llama"), record)
    with torch.no_grad():
        ours, theirs, exact = (each(input_ids=tiny_ids(), use_cache=False).logits for each in (model, again, plain))
    assert torch.equal(ours, theirs) and not torch.allclose(ours, exact, atol=1e-2)
    assert all(layer.weight_quantiser.bits == 3 and layer.rms_norm is None for _, layer in quant_linears(model))
    assert read_record(quantise(tiny_model("llama"), "rtn").config) == Record("rtn", "none", 1e-8, "none")


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"64 inputs wide, which student.quantisation.group_size=48 does not divide"):
        quantise(tiny_model("llama"), "rtn", group_size=48)
    with pytest.raises(ValueError, match="bits and group_size are for rtn, but the quantiser is bitnet"):
        quantise(tiny_model("llama"), "bitnet", bits=4)
    with pytest.raises(ValueError, match="the quantiser is fairy2i"):
        quantise(tiny_model("llama"), "fairy2i", group_size=4)


def test_bits_a_weight_count_scales() -> None:
    assert RoundToNearest(4, 64).stored_bits(100, 128) == 4 + 20 / 64
    assert RTN.stored_bits(100, 128) == 4 + 20 / 128
    assert BITNET.stored_bits(100, 128) == pytest.approx(1.58 + 32 / 12800)
    assert NONE.stored_bits(100, 128) == 16.0
    assert QUANTISERS["rtn"] is RTN and RTN.bits == 4
