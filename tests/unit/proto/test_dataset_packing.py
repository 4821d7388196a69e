"""Numbers as bytes: what was packed comes back, and takes about what its entropy is."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_proto.dataset.packing import one_by_one, planes, rice, several_a_byte, unplanes, unrice

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("rows", [0, 1, 3, 200])
@pytest.mark.parametrize("means", [(0.0,), (0.2, 1.0, 40.0, 9000.0), tuple(np.logspace(-1, 4.5, 64))], ids=len)
def test_rices_code_gives_back_what_went_in(rows: int, means: tuple[float, ...]) -> None:
    numbers_RK = RNG.geometric(1 / (np.array(means) + 1), size=(rows, len(means))) - 1
    widths, code = rice(numbers_RK)
    assert len(widths) == len(means) + rows and (unrice(widths, code, rows) == numbers_RK).all()


@pytest.mark.parametrize("number", [0, 1, 255, 2**16, 2**18, 2**30])
def test_one_large_number_among_small_ones_comes_back_and_costs_no_more_than_its_column(number: int) -> None:
    numbers_RK = np.zeros((50, 3), np.int64)
    numbers_RK[7, 1] = number
    widths, code = rice(numbers_RK)
    assert (unrice(widths, code, 50) == numbers_RK).all()
    assert len(code) < 50 * 3 * 4


def test_geometric_numbers_take_little_more_than_their_entropy() -> None:
    p = 1 / (np.logspace(0, 4, 32) + 1)
    _, code = rice(RNG.geometric(p, size=(4000, 32)) - 1)
    entropy = (-(p * np.log2(p) + (1 - p) * np.log2(1 - p)) / p).sum()
    assert 0.98 * entropy <= 8 * len(code) / 4000 < 1.05 * entropy


def test_rows_that_spread_wider_have_wider_remainders() -> None:
    means = np.logspace(0, 3, 32)
    narrow, wide = (RNG.geometric(1 / (means * times + 1), size=(500, 32)) - 1 for times in (0.25, 4))
    apart = sum(len(rice(half)[1]) for half in (narrow, wide))
    _, code = rice(np.concatenate([narrow, wide]))
    assert len(code) < 1.02 * apart


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 1001])
def test_several_numbers_of_a_byte_come_apart(bits: int, count: int) -> None:
    numbers = RNG.integers(0, 2**bits, count)
    data = several_a_byte(numbers, bits)
    assert len(data) == -(-count // (8 // bits))
    assert (one_by_one(data, bits, count) == numbers).all()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_planes_come_together(count: int) -> None:
    numbers = RNG.integers(0, 2 ** min(8 * count, 31), 77)
    assert (unplanes(planes(numbers, count), count) == numbers).all()
