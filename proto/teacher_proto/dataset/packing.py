"""Small numbers as bytes that take little more than what they say, in numpy without a loop over them. Used by
`compact_layouts`; what zstd makes of the bytes afterwards is the shard's business.
"""

from __future__ import annotations

import math

import numpy as np

# Bits of a number at most, and so of a remainder.
_WORD = 32


def planes(numbers: np.ndarray, count: int) -> bytes:
    """The lowest bytes of all numbers, then the next ones: what is alike stands together."""
    flat = np.ascontiguousarray(numbers, dtype="<u4").reshape(-1).view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(flat[:, :count].T).tobytes()


def unplanes(data: bytes, count: int) -> np.ndarray:
    """The numbers, as int32."""
    each = np.frombuffer(data, np.uint8).reshape(count, -1)
    numbers = each[0].astype(np.int32)
    for place in range(1, count):
        numbers |= each[place].astype(np.int32) << (8 * place)
    return numbers


def several_a_byte(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers of `bits` bits, as many in a byte as it has room for whole: an entropy coder of bytes then sees pairs or
    fours of them, and loses less than half as much to whole bits a symbol.
    """
    each = 8 // bits
    flat = np.ascontiguousarray(numbers, dtype=np.uint8).reshape(-1)
    columns = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    packed: np.ndarray = columns[:, 0]
    for place in range(1, each):
        packed = packed << bits | columns[:, place]
    return np.ascontiguousarray(packed).tobytes()


def one_by_one(data: bytes, bits: int, count: int) -> np.ndarray:
    """What `several_a_byte` put together, as uint8 [count]."""
    each, packed = 8 // bits, np.frombuffer(data, np.uint8)
    columns = [packed >> (bits * (each - 1 - place)) & (2**bits - 1) for place in range(each)]
    return np.stack(columns, axis=1).reshape(-1)[:count]


def rice(numbers_RK: np.ndarray) -> tuple[bytes, bytes]:
    """Rice's code, by columns: a number is a quotient by a power of two, as so many zeros and a one, and a remainder in
    plain bits. Returns the bits of each column's remainder, a byte a column, and the code: remainders by their width,
    then all quotients. For numbers that fall off geometrically from 0 it comes within some per cent of their entropy.
    """
    numbers_RK = np.ascontiguousarray(numbers_RK, dtype=np.uint32)
    widths_K = _widths(numbers_RK)
    parts = []
    for width in np.unique(widths_K[widths_K > 0]):
        bits = np.unpackbits(numbers_RK[:, widths_K == width].astype(">u4").reshape(-1, 1).view(np.uint8), axis=1)
        parts.append(np.packbits(bits[:, _WORD - width :]).tobytes())
    ends = np.cumsum((numbers_RK >> widths_K).reshape(-1).astype(np.int64) + 1)
    unary = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    return widths_K.astype(np.uint8).tobytes(), b"".join((*parts, np.packbits(unary).tobytes()))


def unrice(widths: bytes, code: bytes, rows: int) -> np.ndarray:
    """The numbers [rows, K], as int32."""
    widths_K, data = np.frombuffer(widths, np.uint8), np.frombuffer(code, np.uint8)
    remainders_RK = np.zeros((rows, len(widths_K)), np.int32)
    at = 0
    for width in np.unique(widths_K[widths_K > 0]):
        columns = np.flatnonzero(widths_K == width)
        count = rows * len(columns)
        size = math.ceil(count * int(width) / 8)
        bits = np.zeros((count, _WORD), np.uint8)
        bits[:, _WORD - width :] = np.unpackbits(data[at : at + size], count=count * int(width)).reshape(count, width)
        remainders_RK[:, columns] = np.packbits(bits, axis=1).view(">u4").reshape(rows, -1)
        at += size
    ends = np.flatnonzero(np.unpackbits(data[at:]))[: remainders_RK.size]
    quotients_RK = (np.diff(ends, prepend=-1) - 1).astype(np.int32).reshape(remainders_RK.shape)
    return (quotients_RK << widths_K.astype(np.int32)) + remainders_RK


def _widths(numbers_RK: np.ndarray) -> np.ndarray:
    """The width that makes each column's code shortest, of the one that its mean suggests and the two beside it."""
    mean_K = numbers_RK.mean(axis=0) if len(numbers_RK) else np.zeros(numbers_RK.shape[1])
    guess_K = np.round(np.log2(np.maximum(mean_K * math.log(2), 1.0))).astype(np.int64)
    tried = np.stack([np.maximum(guess_K - 1, 0), guess_K, guess_K + 1]).astype(np.uint32)
    bits = np.stack([(numbers_RK >> widths_K).sum(axis=0) + len(numbers_RK) * widths_K for widths_K in tried])
    return np.take_along_axis(tried, bits.argmin(axis=0)[None], axis=0)[0]
