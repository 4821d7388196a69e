"""Tensors in the wire format: `{"dtype", "shape", "data"}`, with little-endian data of exactly the implied length.

Used by `records.py`, `attention.py`, `responses.py` and the store.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from teacher_proto.errors import WireError

ITEM_SIZE = {"<f2": 2, "<f4": 4, "<u2": 2, "<u4": 4, "<i4": 4, "|u1": 1, "|i1": 1, "u3": 3}
MAX_DIMENSIONS = 4
MAX_SIZE = 2**31 - 1


def encode_tensor(array: np.ndarray, dtype: str | None = None) -> dict[str, Any]:
    """An array as a tensor map. `dtype` "u3" packs integers below 2**24 into three bytes each.

    ValueError for a dtype that the wire format lacks, or integers that the dtype cannot hold.
    """
    name = dtype or array.dtype.newbyteorder("<").str
    if name not in ITEM_SIZE:
        raise ValueError(f"dtype {name} is not part of the wire format; available: {', '.join(ITEM_SIZE)}")
    if array.dtype.kind in "iu" and name != array.dtype.str:
        _check_fits(array, name)
    data = pack_u3(array) if name == "u3" else np.ascontiguousarray(array, dtype=name).reshape(-1).view(np.uint8)
    return {"dtype": name, "shape": list(array.shape), "data": data.data}


def decode_tensor(value: Any, name: str = "tensor", dtypes: Collection[str] = tuple(ITEM_SIZE)) -> np.ndarray:
    """A tensor map as an array: a read-only view of its data, or for `u3` a copy in int32. WireError if malformed."""
    if not isinstance(value, Mapping) or set(value) != {"dtype", "shape", "data"}:
        raise WireError(f"{name}: expected a map of dtype, shape and data")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE or dtype not in dtypes:
        raise WireError(f"{name}: got dtype {str(dtype)[:20]!r}, expected one of {', '.join(dtypes)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise WireError(f"{name}: the shape is not a list of at most {MAX_DIMENSIONS} sizes from 0 to {MAX_SIZE}")
    if not isinstance(data, (bytes, memoryview)):
        raise WireError(f"{name}: data is {type(data).__name__}, expected binary")
    count = math.prod(shape)
    if len(data) != count * ITEM_SIZE[dtype]:
        raise WireError(
            f"{name}: got {len(data)} bytes of data, but {dtype} of shape {shape} takes {count * ITEM_SIZE[dtype]}"
        )
    flat = unpack_u3(data) if dtype == "u3" else np.frombuffer(data, dtype=dtype)
    if count == 0 and math.prod(size for size in shape if size) > MAX_SIZE:
        raise WireError(f"{name}: shape {shape} is empty, but larger than any tensor may be")
    return flat.reshape(shape)


def pack_u3(array: np.ndarray) -> np.ndarray:
    """Integers from 0 to 2**24 - 1 as uint8 [3 * size], low byte first. Writes four ids at a time, as three words."""
    flat = np.ascontiguousarray(array, dtype="<u4").reshape(-1)
    padded = np.zeros(-(-flat.size // 4) * 4, dtype="<u4")
    padded[: flat.size] = flat
    a, b, c, d = padded.reshape(-1, 4).T
    words = np.empty((len(a), 3), dtype="<u4")
    words[:, 0] = a | (b << 24)
    words[:, 1] = (b >> 8) | (c << 16)
    words[:, 2] = (c >> 16) | (d << 8)
    return words.reshape(-1).view(np.uint8)[: 3 * flat.size]


def unpack_u3(data: bytes | memoryview) -> np.ndarray:
    """The integers of packed three-byte groups as int32 [size], read-only."""
    # Read a word at every third byte; the mask drops its high byte, which is the next id's. The last needs a byte more.
    overlapping = np.ndarray(len(data) // 3, dtype="<u4", buffer=bytes(data) + b"\0", strides=(3,))
    wide = (overlapping & np.uint32(0xFFFFFF)).view("<i4")
    wide.flags.writeable = False
    return wide


def _is_size(size: Any) -> bool:
    return type(size) is int and 0 <= size <= MAX_SIZE


def _check_fits(array: np.ndarray, name: str) -> None:
    low, high = (0, 2**24 - 1) if name == "u3" else (np.iinfo(name).min, np.iinfo(name).max)
    if array.size and not (low <= array.min() and array.max() <= high):
        raise ValueError(f"integers from {array.min()} to {array.max()} do not fit {name}, {low} to {high}")
