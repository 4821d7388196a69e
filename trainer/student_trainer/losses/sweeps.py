"""All that is done to an array as wide as the vocabulary: one sweep in, one sweep out. Called by `passes`.

Between the two, everything is a few numbers a row. On a CPU the first sweep keeps the softmax, since another exp costs
more than the memory; on a GPU the second makes it again inside one compiled kernel, since memory costs more than exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# What stands in the logits where an id is taken out: its exponential vanishes, and unlike -inf it survives a row of it.
HOLE = -1e20


@dataclass(frozen=True)
class Swept:
    """lse(z / T) of each row, and its softmax where that was kept."""

    lse_N: Tensor
    q_NW: Tensor | None


def makes_softmax_again(z_NW: Tensor) -> bool:
    """Whether exponentials cost less than memory where `z_NW` lies. Tests force both sides on a CPU."""
    return z_NW.is_cuda


def sweep_in(z_NW: Tensor, temperature: float) -> Swept:
    """The normaliser of softmax(z / T)."""
    if makes_softmax_again(z_NW):
        return Swept(compiled(_normaliser)(z_NW, 1.0 / temperature), None)
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    # The largest entry gives the lse; torch.logsumexp would take every exponential again.
    return Swept(z_NW.amax(-1) / temperature - q_NW.amax(-1).log(), q_NW)


def sweep_out(swept: Swept, z_NW: Tensor, temperature: float, row_N: Tensor, *, overwrite: bool) -> Tensor:
    """softmax(z / T) times a number a row; with `overwrite` written over `z_NW`, else into memory of its own."""
    if swept.q_NW is not None:
        return torch.mul(swept.q_NW, row_N[:, None], out=z_NW if overwrite else swept.q_NW)
    sweep = compiled(_spread_ if overwrite else _spread)
    return sweep(z_NW, 1.0 / temperature, swept.lse_N, row_N)


def _normaliser(z_NW: Tensor, inverse: float) -> Tensor:
    return torch.logsumexp(z_NW * inverse, -1)


def _spread(z_NW: Tensor, inverse: float, lse_N: Tensor, row_N: Tensor) -> Tensor:
    return torch.exp(z_NW * inverse - lse_N[:, None]) * row_N[:, None]


def _spread_(z_NW: Tensor, inverse: float, lse_N: Tensor, row_N: Tensor) -> Tensor:
    """`_spread` over its input. One argument, since of two that share memory the compiler fixes the distance between
    them at the first call, and every block of a chunk lies elsewhere."""
    return z_NW.copy_(_spread(z_NW, inverse, lse_N, row_N))


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one kernel; compiled at its first call on a GPU, never on a CPU."""
    return torch.compile(function)
