"""`GET /v1/head`: the file or what a client lacks of it, in pieces, under one checksum. Used by `app.py`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping

from serving.http.streams import Outlet
from teacher_service.head_file import ServedHead

_PIECE_BYTES = 2**20
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?")


def wanted_range(headers: Mapping[str, str], head: ServedHead) -> tuple[int, int] | None:
    """The bytes [start, stop) that a request asks for, None for all: also where its range is none that we serve, or is
    of another file (`If-Range`)."""
    asked = _RANGE.fullmatch(headers.get("range", "").strip())
    if asked is None or headers.get("if-range", head.etag) != head.etag:
        return None
    start, stop = int(asked[1]), int(asked[2] or head.file.size - 1) + 1
    return (start, min(stop, head.file.size)) if start < min(stop, head.file.size) else None


async def send_head(headers: Mapping[str, str], head: ServedHead, fingerprint: str, outlet: Outlet) -> None:
    """Write the answer to a request with these headers."""
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
