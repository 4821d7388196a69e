"""The GPU's way through the vocabulary against the CPU's: same normaliser, same product, written over its input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from student_trainer.losses import sweeps


def check(normaliser: Callable[..., torch.Tensor], spread: Callable[..., None]) -> None:
    for rows, temperature in ((5, 1.0), (12, 3.0)):
        z_NW = torch.randn(rows, 700) * 4
        z_NW.scatter_(1, torch.randint(700, (rows, 9)), sweeps.HOLE)
        row_N = torch.randn(rows)
        swept = sweeps.sweep_in(z_NW, temperature)
        on_cpu_NW = sweeps.sweep_out(swept, z_NW, temperature, row_N, torch.empty_like(z_NW))
        torch.testing.assert_close(on_cpu_NW, (z_NW / temperature).softmax(-1) * row_N[:, None])
        lse_N = normaliser(z_NW, 1.0 / temperature)
        torch.testing.assert_close(lse_N, (z_NW / temperature).logsumexp(-1))
        torch.testing.assert_close(swept.lse_N, lse_N)
        over_NW = z_NW.clone()
        spread(over_NW, over_NW, 1.0 / temperature, lse_N, row_N)
        torch.testing.assert_close(over_NW, on_cpu_NW)
        assert not bool(over_NW[z_NW == sweeps.HOLE].any())


def test_both_ways_agree() -> None:
    check(sweeps._normaliser, sweeps._spread)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_ways_agree_when_compiled() -> None:
    """Through torch.compile, as on a GPU; it writes over its own input there too."""
    check(sweeps.compiled(sweeps._normaliser), sweeps.compiled(sweeps._spread))
