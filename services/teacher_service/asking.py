"""From an HTTP request to a question that the engine may hear: content types, decoding, and whom it is for.

Used by the routes in `app.py`. Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request

from teacher_proto import wire
from teacher_proto.errors import UnsupportedTypeError, WrongTeacherError
from teacher_proto.identity import compare_fingerprints
from teacher_proto.requests import Limits, check_request, parse_request
from teacher_proto.wire_json import decode_json_request
from teacher_service.asked import Asked
from teacher_service.replies import check_json_size
from teacher_service.service import TeacherService


async def read_targets(request: Request, student: str, service: TeacherService) -> tuple[Asked, bool]:
    """The body of `POST /v1/targets`, checked against the engine's limits; and whether its answer is to be JSON."""
    content_type = media_type(request, wire.MSGPACK, wire.JSON)
    parsed = parse_request(decode(await request.body(), content_type, service.engine.limits))
    check_request(parsed, service.engine.limits, service.engine.kinds)
    _check_fingerprint(parsed.fingerprint, service)
    asked = Asked(parsed, student, request.state.request_id)
    as_json = _wants_json(request.headers.get("accept", ""), content_type)
    if as_json:
        check_json_size(asked, service.hidden_width)
    return asked, as_json


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """The plain fields of a JSON body."""
    content_type = media_type(request, wire.JSON)
    return decode(await request.body(), content_type, limits)


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


def decode(body: bytes, content_type: str, limits: Limits) -> dict[str, Any]:
    """The plain fields of a request. WireError where the bytes are neither."""
    return wire.decode_request(body, limits) if content_type == wire.MSGPACK else decode_json_request(body, limits)


def _wants_json(accept: str, content_type: str) -> bool:
    """The Accept header decides where it names one of the two, else the answer comes as the question did."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in named:
        if kind in (wire.MSGPACK, wire.JSON):
            return kind == wire.JSON
    return content_type == wire.JSON


def _check_fingerprint(asked: str | None, service: TeacherService) -> None:
    """Refuse a request that is meant for a teacher with other weights. A numeric difference is the client's to judge:
    the header tells it."""
    ours = service.engine.identity.fingerprint
    if asked is not None and compare_fingerprints(asked, ours) == "semantic":
        raise WrongTeacherError(
            f"the request is for the teacher {asked[:80]!r}, this is {ours}: GET /v1/teacher tells who it is",
            field="fingerprint", got=asked[:80], limit=ours,
        )  # fmt: skip


def max_body(service: TeacherService, content_type: str) -> int:
    """Bytes that a body of this content type may have."""
    limits = service.engine.limits if service.started else Limits(vocab_size=1, max_sequence_length=1)
    return limits.max_json_bytes if content_type.startswith(wire.JSON) else limits.max_body_bytes
