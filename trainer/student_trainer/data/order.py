"""A seeded shuffle that holds nothing in memory: the k-th document of an epoch, for any k. Used by the sources.

A balanced Feistel network over the smallest even power of two that covers the count, cycle-walked back into range
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). At most four steps per position on average.
"""

import hashlib

import numpy as np

ROUNDS = 6
MASK = (1 << 64) - 1


def key_of(*parts: object) -> int:
    """A 64-bit key from objects with a stable repr: seed, source name, epoch, purpose."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _mix(values_N: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014), on uint64."""
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_N ^ (values_N >> np.uint64(31))


def _feistel(values_N: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left_N, right_N = values_N >> shift, values_N & mask
    for round_number in range(ROUNDS):
        round_key = np.uint64((key + (round_number + 1) * 0x9E3779B97F4A7C15) & MASK)
        left_N, right_N = right_N, left_N ^ (_mix(right_N ^ round_key) & mask)
    return (left_N << shift) | right_N


def shuffled(positions_N: np.ndarray, count: int, key: int) -> np.ndarray:
    """Map positions through the permutation of `range(count)` that `key` selects. int64 in, int64 out."""
    assert count > 0 and (len(positions_N) == 0 or (positions_N.min() >= 0 and positions_N.max() < count))
    half_bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    values_N = _feistel(positions_N.astype(np.uint64), half_bits, key)
    outside_N = values_N >= count
    while outside_N.any():
        values_N[outside_N] = _feistel(values_N[outside_N], half_bits, key)
        outside_N = values_N >= count
    return values_N.astype(np.int64)


def hashed(count: int, key: int) -> np.ndarray:
    """A pseudo-random number in [0, 1) for each of `range(count)`, float64."""
    values_N = _mix(_mix(np.arange(count, dtype=np.uint64) ^ np.uint64(key)) ^ np.uint64(key))
    return (values_N >> np.uint64(11)).astype(np.float64) * 2.0**-53
