"""Draws from a teacher's distributions for targets of kind `sampled`: the same on every device and in every batch.

Called by `reduction.py`; engines make the keys of their sequences with `sample_key`.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def sample_key(seed: int, tokens_T: np.ndarray) -> int:
    """The key of a sequence's draws, a signed 64-bit integer that depends only on seed and tokens.

    It includes the tokens so that different sequences have independent noise under the same seed.
    """
    state = hashlib.sha256(seed.to_bytes(8, "little") + np.ascontiguousarray(tokens_T, dtype="<i8").tobytes())
    return int.from_bytes(state.digest()[:8], "little", signed=True)


def draw(
    distance_NV: torch.Tensor, keys_N: torch.Tensor, positions_N: torch.Tensor, count: int, temperature: float
) -> torch.Tensor:
    """[N, count] ids int64, drawn with replacement at `temperature`; ascending within a row.

    `distance` is logits minus the largest of their row; `keys` from `sample_key`; `positions` in the sequence.

    Inverse transform sampling with noise that depends only on (sample key, position, draw), so a row's draws do not
    depend on how it was batched.
    """
    import torch

    # float64, since fp32 would lose the smallest of up to 150,000 terms. Instead of dividing the sums by their total,
    # the noise is multiplied by it: N x draws operations, not N x V.
    cumulative_NV = (distance_NV * (1.0 / temperature)).exp().cumsum(dim=-1, dtype=torch.float64)
    uniform_NM = uniform_noise(keys_N, positions_N, count)
    # The first id whose sum is above the noise; `right` excludes ids of probability 0.
    ids_NM = torch.searchsorted(cumulative_NV, uniform_NM * cumulative_NV[:, -1:], right=True)
    # A row with NaN gives an index beyond its end.
    return ids_NM.clamp(max=distance_NV.shape[1] - 1).sort(dim=-1).values


# 2**64 over the golden ratio, 0x9e3779b97f4a7c15, as int64: the step from one state of splitmix64 to the next.
_GAMMA = -7046029254386353131


def uniform_noise(keys_N: torch.Tensor, positions_N: torch.Tensor, count: int) -> torch.Tensor:
    """[N, count] float64 in [0, 1): splitmix64 of key, position and number of the draw, the same on every device."""
    import torch

    number_M = torch.arange(1, count + 1, device=keys_N.device, dtype=torch.int64)
    # One generator per position, seeded by key and position, and the first `count` numbers of each.
    state_N = _splitmix(keys_N + positions_N * _GAMMA)
    bits_NM = _splitmix(state_N[:, None] + number_M * _GAMMA)
    # The upper 53 bits: as many as float64 has.
    return _shift_right(bits_NM, 11).to(torch.float64) * 2.0**-53


def _splitmix(x: torch.Tensor) -> torch.Tensor:
    # Steele, Lea and Flood (2014), finaliser of SplittableRandom; int64 wraps as uint64 does. Its factors are
    # 0xbf58476d1ce4e5b9 and 0x94d049bb133111eb.
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # A logical shift: int64's own fills with the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
