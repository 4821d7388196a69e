"""Packs small integers into few bytes, vectorised in numpy. Used by `compact_layouts`; the shard compresses the result
with zstd.
"""

from __future__ import annotations

import numpy as np

# The most bits of a number, and so of a remainder.
_WORD = 32
# By how many bits a row's remainders may be wider or narrower than those of their columns.
_SHIFTS = range(-3, 4)


def planes(numbers: np.ndarray, count: int) -> bytes:
    """The lowest bytes of all numbers, then the next ones: similar bytes are adjacent, and compress better."""
    flat = np.ascontiguousarray(numbers, dtype="<u4").reshape(-1).view(np.uint8).reshape(-1, 4)
    return np.ascontiguousarray(flat[:, :count].T).tobytes()


def unplanes(data: bytes, count: int) -> np.ndarray:
    """The numbers that `planes` packed, as int32."""
    each = np.frombuffer(data, np.uint8).reshape(count, -1)
    numbers = each[0].astype(np.int32)
    for place in range(1, count):
        numbers |= each[place].astype(np.int32) << (8 * place)
    return numbers


def several_a_byte(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers of `bits` bits, as many per byte as fit whole: a byte-wise entropy coder, which spends whole bits on a
    symbol, then codes two or four at a time, and loses less than half as much.
    """
    each = 8 // bits
    flat = np.ascontiguousarray(numbers, dtype=np.uint8).reshape(-1)
    columns = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    packed: np.ndarray = columns[:, 0]
    for place in range(1, each):
        packed = packed << bits | columns[:, place]
    return np.ascontiguousarray(packed).tobytes()


def one_by_one(data: bytes, bits: int, count: int) -> np.ndarray:
    """The numbers that `several_a_byte` packed, as uint8 [count]."""
    each, packed = 8 // bits, np.frombuffer(data, np.uint8)
    columns = [packed >> (bits * (each - 1 - place)) & (2**bits - 1) for place in range(each)]
    return np.stack(columns, axis=1).reshape(-1)[:count]


def rice(numbers_RK: np.ndarray) -> tuple[bytes, bytes]:
    """A Rice code: each number is divided by a power of two; the quotient is coded in unary, as that many zeros and a
    one, the remainder in binary. For geometrically distributed numbers that is within some per cent of their entropy.
    The width of a remainder in bits is a number per column plus one per row, since some rows spread wider than others.

    Returns the widths, a byte per column and a byte per row, and the code: remainders by width, then all quotients.
    """
    numbers_RK = np.ascontiguousarray(numbers_RK, dtype=np.uint32)
    widths_K, shifts_R = _fitted(numbers_RK)
    order, edges, widths = _by_width(widths_K, shifts_R)
    # [M, 4] bytes, highest first: `unpackbits` gives 32 bits per number, of which the last `width` are its remainder.
    # Numbers of one width are adjacent, so that each width is one slice.
    sorted_M = numbers_RK.reshape(-1)[order].astype(">u4").reshape(-1, 1).view(np.uint8)
    parts = [
        np.packbits(np.unpackbits(sorted_M[begin:end], axis=1)[:, _WORD - width :]).tobytes()
        for width, begin, end in edges
    ]
    # Quotient q as q zeros and a one: it takes q + 1 bits, the last of which is the one.
    ends = np.cumsum((numbers_RK.reshape(-1) >> widths).astype(np.int64) + 1)
    unary = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
    unary[ends - 1] = 1
    told = np.concatenate([widths_K, shifts_R - _SHIFTS[0]]).astype(np.uint8).tobytes()
    return told, b"".join((*parts, np.packbits(unary).tobytes()))


def unrice(told: bytes, code: bytes, rows: int) -> np.ndarray:
    """The numbers [rows, K] that `rice` packed, as int32."""
    both, data = np.frombuffer(told, np.uint8).astype(np.int64), np.frombuffer(code, np.uint8)
    widths_K, shifts_R = both[: len(both) - rows], both[len(both) - rows :] + _SHIFTS[0]
    order, edges, widths = _by_width(widths_K, shifts_R)
    sorted_M = np.zeros(len(order), np.int32)
    at = 0
    for width, begin, end in edges:
        # Pad the remainders of one width to 32 bits each, and pack those into four-byte numbers.
        bits = np.zeros((end - begin, _WORD), np.uint8)
        size = -(-(end - begin) * width // 8)
        plain = np.unpackbits(data[at : at + size], count=(end - begin) * width)
        bits[:, _WORD - width :] = plain.reshape(-1, width)
        sorted_M[begin:end] = np.packbits(bits, axis=1).view(">u4")[:, 0]
        at += size
    ends = np.flatnonzero(np.unpackbits(data[at:]))[: len(order)]
    # The distance between two ones, minus one, is the quotient. The remainders are still sorted by width.
    numbers_M = (np.diff(ends, prepend=-1) - 1).astype(np.int32) << widths
    numbers_M[order] += sorted_M
    return numbers_M.reshape(rows, len(widths_K))


def _by_width(widths_K: np.ndarray, shifts_R: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]], np.ndarray]:
    """Indexes of the numbers in order of their widths, (width, begin, end) for each width above 0, and all widths."""
    widths = _widths(widths_K, shifts_R).reshape(-1)
    order = np.argsort(widths, kind="stable")  # of bytes: a radix sort
    ends = np.cumsum(np.bincount(widths, minlength=1))
    edges = [(width, int(ends[width - 1]), int(ends[width])) for width in range(1, len(ends))]
    return order, [edge for edge in edges if edge[1] < edge[2]], widths


def _widths(widths_K: np.ndarray, shifts_R: np.ndarray) -> np.ndarray:
    return np.maximum(widths_K[None, :] + shifts_R[:, None], 0).astype(np.uint8)


def _fitted(numbers_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths of columns and shifts of rows that make the code short, optimised in turn, starting from the means."""
    mean_K = numbers_RK.mean(axis=0) if len(numbers_RK) else np.zeros(numbers_RK.shape[1])
    # The starting point: the best width for a geometric distribution is about log2(ln 2 times its mean).
    widths_K = np.round(np.log2(np.maximum(mean_K * np.log(2), 1.0))).astype(np.int64)
    shifts_R = np.zeros(len(numbers_RK), np.int64)
    # Alternate: the best shift of each row for these widths, then the best width of each column for these shifts, at
    # most one bit up or down.
    for _ in range(2):
        bits = [_bits(numbers_RK, _widths(widths_K, shifts_R * 0 + shift)).sum(axis=1) for shift in _SHIFTS]
        shifts_R = np.array(_SHIFTS)[np.argmin(bits, axis=0)]
        tried = [np.maximum(widths_K + step, 0) for step in (-1, 0, 1)]
        bits = [_bits(numbers_RK, _widths(one_K, shifts_R)).sum(axis=0) for one_K in tried]
        widths_K = np.choose(np.argmin(bits, axis=0), tried)
    return widths_K, shifts_R


def _bits(numbers_RK: np.ndarray, widths_RK: np.ndarray) -> np.ndarray:
    """Bits of each number's code, without its one."""
    return (numbers_RK >> widths_RK) + widths_RK
