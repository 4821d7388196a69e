"""All that torch does to an array as wide as the vocabulary: one sweep in, one sweep out. Called by `passes`.

Between the two, everything is a few numbers a row. The first sweep keeps the softmax for the second, since on a CPU
another exp costs more than the memory. A GPU's kernels make it again, see `fused`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What stands in the logits where an id is taken out: its exponential vanishes, and unlike -inf it survives a row of it.
HOLE = -1e20


@dataclass(frozen=True)
class Swept:
    """lse(z / T) of each row, and its softmax."""

    lse_N: Tensor
    q_NW: Tensor


def sweep_in(z_NW: Tensor, temperature: float) -> Swept:
    """The normaliser of softmax(z / T)."""
    q_NW = torch.softmax(z_NW if temperature == 1.0 else z_NW / temperature, -1)
    # The largest entry gives the lse; torch.logsumexp would take every exponential again.
    return Swept(z_NW.amax(-1) / temperature - q_NW.amax(-1).log(), q_NW)


def sweep_out(swept: Swept, z_NW: Tensor, row_N: Tensor, *, overwrite: bool) -> Tensor:
    """softmax(z / T) times a number a row; with `overwrite` written over `z_NW`, else over the softmax."""
    return torch.mul(swept.q_NW, row_N[:, None], out=z_NW if overwrite else swept.q_NW)
