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


def sweep_in(z_NW: Tensor, temperature: float) -> Swept:
    """The normaliser of softmax(z / T)."""
    if z_NW.is_cuda:
        return Swept(compiled(_normaliser)(z_NW, 1.0 / temperature), None)
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    # The largest entry gives the lse; torch.logsumexp would take every exponential again.
    return Swept(z_NW.amax(-1) / temperature - q_NW.amax(-1).log(), q_NW)


def sweep_out(swept: Swept, z_NW: Tensor, temperature: float, row_N: Tensor, out_NW: Tensor | None) -> Tensor:
    """softmax(z / T) times a number a row; into `out_NW` if given, which may be `z_NW`."""
    if swept.q_NW is not None:
        return torch.mul(swept.q_NW, row_N[:, None], out=swept.q_NW if out_NW is None else out_NW)
    out_NW = torch.empty_like(z_NW) if out_NW is None else out_NW
    compiled(_spread)(out_NW, z_NW, 1.0 / temperature, swept.lse_N, row_N)
    return out_NW


def _normaliser(z_NW: Tensor, inverse: float) -> Tensor:
    return torch.logsumexp(z_NW * inverse, -1)


def _spread(out_NW: Tensor, z_NW: Tensor, inverse: float, lse_N: Tensor, row_N: Tensor) -> None:
    out_NW.copy_(torch.exp(z_NW * inverse - lse_N[:, None]) * row_N[:, None])


@cache
def compiled(function: Callable[..., Tensor | None]) -> Callable[..., Tensor]:
    """The function as one kernel; compiled at its first call on a GPU, never on a CPU."""
    return torch.compile(function)
