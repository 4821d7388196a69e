"""From an HTTP request to a question that the engine may hear. Used by the routes in `app.py`.

Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

from fastapi import Request

from serving.asking import check_fingerprint, read_fields
from serving.replies import JSON_WEIGHT, check_json_size
from teacher_proto.requests import TargetsRequest, check_request, parse_request
from teacher_service.asked import Asked
from teacher_service.service import TeacherService


async def read_targets(request: Request, student: str, service: TeacherService) -> tuple[Asked, bool]:
    """The body of `POST /v1/targets`, checked against the engine's limits; and whether its answer is to be JSON."""
    engine = service.engine
    fields, as_json = await read_fields(request, engine.limits, TargetsRequest)
    parsed = parse_request(fields)
    check_request(parsed, engine.limits, engine.kinds)
    check_fingerprint(parsed.fingerprint, engine.identity.fingerprint)
    if as_json:
        check_json_size(parsed.cost(service.hidden_width))
    canary = service.is_canary(parsed)
    urgent = canary and service.control.take(student)
    weight = JSON_WEIGHT if as_json else 1
    return Asked(parsed, student, request.state.request_id, weight, fresh=canary, urgent=urgent), as_json
