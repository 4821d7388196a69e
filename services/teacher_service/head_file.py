"""The output head as the safetensors file of `GET /v1/head`, generated from the engine's tensors while it is sent: all
of it, or the part that a client lacks, in pieces, under one checksum.

Nothing is written to disk. Engines make one, `service.py` keeps it, `app.py` sends it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from serving.http.streams import Outlet
from teacher_proto.compute.head import HeadScaling
from teacher_proto.errors import NotFoundError
from teacher_service.engines.protocol import Engine

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_READ_BYTES = 4 * 2**20
_PIECE_BYTES = 2**20
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?")


@dataclass(frozen=True)
class HeadTensor:
    """One tensor [N, ...]: its dtype as named by safetensors; `read(start, stop)` returns the bytes of those rows."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], bytes]

    @property
    def row_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes if self.shape else _ITEM_BYTES[self.dtype]


def scalar(value: float) -> HeadTensor:
    data = np.array(value, "<f4").tobytes()
    return HeadTensor("F32", (), lambda start, stop: data)


class HeadFile:
    """A virtual safetensors file: `read` generates any part of its `size` bytes. Its methods block, and may be called
    from any thread."""

    def __init__(self, tensors: Mapping[str, HeadTensor], scaling: HeadScaling):
        scalars = {"scale": scalar(scaling.scale)}
        if scaling.soft_cap is not None:
            scalars["soft_cap"] = scalar(scaling.soft_cap)
        # In the order of safetensors: wide types first, so that every tensor is aligned to the size of its items.
        parts = sorted({**tensors, **scalars}.items(), key=lambda item: (-_ITEM_BYTES[item[1].dtype], item[0]))
        fields, end = {}, 0
        for name, tensor in parts:
            begin, end = end, end + tensor.num_bytes
            fields[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self._tensors = [tensor for _, tensor in parts]
        self.size = len(self._head) + end

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file."""
        pieces = [self._head[start:stop]]
        begin = len(self._head)
        for tensor in self._tensors:
            low, high = max(start - begin, 0), min(stop - begin, tensor.num_bytes)
            if low < high:
                pieces.append(_part(tensor, low, high))
            begin += tensor.num_bytes
        return b"".join(pieces)

    def sha256(self) -> bytes:
        """The digest of the whole file, which is read once for it."""
        digest = hashlib.sha256()
        for start in range(0, self.size, _READ_BYTES):
            digest.update(self.read(start, min(start + _READ_BYTES, self.size)))
        return digest.digest()


def _part(tensor: HeadTensor, low: int, high: int) -> bytes:
    """Bytes [low, high) of a tensor."""
    if not tensor.shape:
        return tensor.read(0, 1)[low:high]
    first = low // tensor.row_bytes
    rows = tensor.read(first, -(-high // tensor.row_bytes))
    return rows[low - first * tensor.row_bytes : high - first * tensor.row_bytes]


@dataclass(frozen=True)
class ServedHead:
    """The file with its checksum, which is also its entity tag: a download may resume at another replica."""

    file: HeadFile
    sha256: bytes

    @property
    def etag(self) -> str:
        return f'"{self.sha256.hex()}"'

    @property
    def digest(self) -> str:
        """The value of `Repr-Digest` (RFC 9530)."""
        return f"sha-256=:{base64.b64encode(self.sha256).decode()}:"


class KeptHead:
    """The head of an engine, hashed at the first request for it; requests in the meantime wait for that."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._hashing: asyncio.Task[ServedHead] | None = None

    async def head(self) -> ServedHead:
        """NotFoundError if the engine serves no hidden states."""
        if "hidden" not in self._engine.kinds:
            raise NotFoundError(
                "this teacher serves no hidden states, so it has no head: see `kinds` in GET /v1/teacher",
                field="path",
            )
        if self._hashing is None or (self._hashing.done() and self._hashing.exception() is not None):
            self._hashing = asyncio.create_task(self._hash())
        return await asyncio.shield(self._hashing)

    async def _hash(self) -> ServedHead:
        file = self._engine.head()
        return ServedHead(file, await asyncio.to_thread(file.sha256))


def wanted_range(headers: Mapping[str, str], head: ServedHead) -> tuple[int, int] | None:
    """The requested bytes [start, stop), None for all: also if the range is not one that we serve, or is of another
    file (`If-Range`)."""
    asked = _RANGE.fullmatch(headers.get("range", "").strip())
    if asked is None or headers.get("if-range", head.etag) != head.etag:
        return None
    start, stop = int(asked[1]), int(asked[2] or head.file.size - 1) + 1
    return (start, min(stop, head.file.size)) if start < min(stop, head.file.size) else None


async def send_head(headers: Mapping[str, str], head: ServedHead, fingerprint: str, outlet: Outlet) -> None:
    """Write the response to a request with these headers."""
    size, part = head.file.size, wanted_range(headers, head)
    start, stop = part or (0, size)
    told = {
        "Content-Length": str(stop - start), "Accept-Ranges": "bytes", "ETag": head.etag, "Repr-Digest": head.digest,
        "X-Teacher-Fingerprint": fingerprint,
    }  # fmt: skip
    if part is not None:
        told["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    await outlet.start("application/octet-stream", 200 if part is None else 206, told)
    for begin in range(start, stop, _PIECE_BYTES):
        end = min(begin + _PIECE_BYTES, stop)
        await outlet.write(await asyncio.to_thread(head.file.read, begin, end), last=end == stop)
