"""Between HTTP and a request: content types, decoding, and whom a request is for. Used by each service's routes.

Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

import math
from typing import Any

from fastapi import Request

from teacher_proto.errors import MalformedError, UnsupportedTypeError, WrongTeacherError
from teacher_proto.identity import compare_fingerprints
from teacher_proto.request_checks import SequenceLimits, SequencesRequest
from teacher_proto.wire import records as wire
from teacher_proto.wire.answers import PROGRESS_INTERVAL_S
from teacher_proto.wire.as_json import decode_json_request


async def read_json(request: Request, limits: SequenceLimits) -> dict[str, Any]:
    """The plain fields of a JSON body."""
    media_type(request, wire.JSON)
    return decode_json_request(await request.body(), limits)


async def read_fields(
    request: Request, limits: SequenceLimits, kind: type[SequencesRequest]
) -> tuple[dict[str, Any], bool]:
    """The plain fields of a msgpack or JSON body, and whether the answer is to be JSON. WireError where the bytes are
    neither."""
    content_type = media_type(request, wire.MSGPACK, wire.JSON)
    body = await request.body()
    packed = content_type == wire.MSGPACK
    fields = wire.decode_request(body, limits, kind) if packed else decode_json_request(body, limits)
    return fields, _wants_json(request.headers.get("accept", ""), content_type)


def media_type(request: Request, *spoken: str) -> str:
    """The content type of the body, one of `spoken`. UnsupportedTypeError otherwise."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind not in spoken:
        raise UnsupportedTypeError(
            f"Content-Type {given[:80]!r} is not spoken here: send {' or '.join(spoken)}", field="Content-Type",
            got=given[:80], limit=list(spoken),
        )  # fmt: skip
    return kind


def progress_interval(request: Request) -> float | None:
    """After how many seconds without a word the client wants to hear of its progress; None if it never does."""
    given = request.headers.get(wire.PROGRESS_HEADER)
    if given is None:
        return None
    try:
        wished = float(given)
    except ValueError:
        wished = math.nan
    if not wished > 0:
        raise MalformedError(
            f"X-Progress: got {given[:40]!r}, expected seconds, like 2", field="X-Progress", got=given[:40]
        )
    low, high = PROGRESS_INTERVAL_S
    return min(high, max(low, wished))


def check_fingerprint(asked: str | None, ours: str) -> None:
    """Refuse a request that is meant for a teacher with other weights. A numeric difference is the client's to judge:
    the header tells it."""
    if asked is not None and compare_fingerprints(asked, ours) == "semantic":
        raise WrongTeacherError(
            f"the request is for the teacher {asked[:80]!r}, this is {ours}: GET /v1/teacher tells who it is",
            field="fingerprint", got=asked[:80], limit=ours,
        )  # fmt: skip


def max_body(limits: SequenceLimits | None, content_type: str) -> int:
    """Bytes that a body of this content type may have; `limits` are None while the model loads."""
    limits = limits or SequenceLimits(vocab_size=1, max_sequence_length=1)
    return limits.max_json_bytes if content_type.startswith(wire.JSON) else limits.max_body_bytes


def _wants_json(accept: str, content_type: str) -> bool:
    """The Accept header decides where it names one of the two, else the answer comes as the question did."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in named:
        if kind in (wire.MSGPACK, wire.JSON):
            return kind == wire.JSON
    return content_type == wire.JSON
